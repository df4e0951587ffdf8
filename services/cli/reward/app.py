"""`fusion reward`: a reward model of a recipe, trained, evaluated, and asked for scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import (
    DetachOption,
    RayAddressOption,
    RecipeArgument,
    SetOption,
    out,
    print_line,
    print_note,
    read_recipe,
    user_errors,
)

app = typer.Typer(help="Train and use a conditional reward model.", no_args_is_help=True)
_RunName = Annotated[str, typer.Option(help="Folder of the run below `reward` in the recipe's.")]


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: _RunName = "trained",
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints and model of the same run name.")] = False,
    detach: DetachOption = False,
    ray_address: RayAddressOption = None,
) -> None:
    """Train the reward model of section `reward` as a Ray job. Running it again resumes from the last checkpoint."""
    from services.commands.reward.train import train_reward_model
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        code = train_reward_model(
            checked, run_name=run_name, start_over=start_over, follow=not detach, dashboard=ray_address, console=out
        )
    raise typer.Exit(code)


@app.command(name="eval")
def evaluate(recipe: RecipeArgument, set_: SetOption = None, run_name: _RunName = "trained") -> None:
    """Show how often held-out pairs are in the right order, under each domain's system prompt, with 95 % intervals."""
    with user_errors():
        from rich.table import Table

        from services.commands.reward.evaluate import evaluate_run

        found, file = evaluate_run(read_recipe(recipe, set_), run_name)
        prompts = list(dict.fromkeys(prompt for _, prompt in found.shares))
        table = Table("pairs of", "number", *(f"prompt {prompt}" for prompt in prompts))
        for domain in dict.fromkeys(domain for domain, _ in found.shares):
            shares = [found.shares[domain, prompt] for prompt in prompts]
            cells = [f"{s.value:.3f} ({s.interval[0]:.3f} to {s.interval[1]:.3f})" for s in shares]
            table.add_row(domain, str(shares[0].number), *cells)
        out.print(table)
        right = found.right()
        print_line(
            f"right under its own prompt: {right.value:.3f} ({right.interval[0]:.3f} to {right.interval[1]:.3f}), "
            f"scores {found.least_score:.2f} to {found.largest_score:.2f}"
        )
        if found.left_out:
            print_note(f"{found.left_out} pairs are longer than the model reads, or refused by its template")
        print_line(f"written to {file}")


@app.command()
def score(
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS.jsonl", exists=True, dir_okay=False, help="Answers, as `fusion sample --to` writes."
        ),
    ],
    domain: Annotated[str | None, typer.Option(help="Domain of rows that name none.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a reward model, to score in this process.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a reward service, instead of --model.")] = None,
    application: Annotated[str, typer.Option(help="Serve application of that service.")] = "reward",
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write the rows there, each with its `reward`.")
    ] = None,
) -> None:
    """Score answers with a reward model: a folder, or one that is served."""
    with user_errors():
        from rich.table import Table

        from services.commands.reward.score import ScoreAnswers

        command = ScoreAnswers(answers, domain, model, address, application)
        command.run(to)
        table = Table("source", "domain", "answers", "mean", "least", "largest")
        for (source, name), found in sorted(command.summaries.items()):
            mean = found.total / found.answers
            table.add_row(
                source, name, f"{found.answers:,}", f"{mean:.3f}", f"{found.least:.3f}", f"{found.largest:.3f}"
            )
        out.print(table if table.row_count else "no answers")
        if to is not None:
            print_line(f"scores: {to}")


@app.command()
def patch(
    recipe: RecipeArgument,
    samples: Annotated[
        Path,
        typer.Argument(
            metavar="SCORED.jsonl", exists=True, dir_okay=False, help="Answers, as `fusion reward score --to` writes."
        ),
    ],
    run_name: Annotated[str, typer.Option(help="Folder of the patched model, below `reward` in the recipe's.")],
    set_: SetOption = None,
    start: Annotated[str, typer.Option(help="Run whose model is patched.")] = "trained",
    detector: Annotated[
        list[str] | None, typer.Option(help="length, repetition, refusal or verifier; all by default, may be repeated.")
    ] = None,
    usual_words: Annotated[
        float | None, typer.Option(min=1, help="Words of an answer before tuning; default the samples' median.")
    ] = None,
) -> None:
    """Find reward hacks in scored answers, several to a prompt, and tune the reward model against them, here."""
    with user_errors():
        from rich.table import Table

        from services.commands.reward.patch import patch_run

        checked = read_recipe(recipe, set_)
        found, line = patch_run(
            checked, samples, run_name=run_name, start=start, detectors=detector or (), usual_words=usual_words
        )
        table = Table("detector", "suspicious answers", "prompts where one wins")
        for incident in found:
            table.add_row(incident.detector, f"{incident.answers:,}", f"{incident.prompts:,}")
        out.print(table)
        if not line["pairs"]:
            print_line("nothing to patch: no incident has reward.patch.least_pairs pairs")
        else:
            print_line(f"{line['pairs']} pairs, {line['replayed']} replayed; the model is in {line['model']}")
        if "right_after" in line:
            print_line(
                f"held-out pairs in the right order: {line['right_before']:.3f} before, {line['right_after']:.3f} after"
            )
