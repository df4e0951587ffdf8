"""`fusion distill`, `eval`, `runs`, `report` and `quickstart`: training runs, and the quality of their models."""

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
from services.recipes.recipe import RecipeError


def distill(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: Annotated[str, typer.Option(help="Folder of this training run below the recipe's.")] = "fused",
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints of the same run name.")] = False,
    detach: DetachOption = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the run; its checkpoints stay.")] = False,
    ray_address: RayAddressOption = None,
) -> None:
    """Submit the distillation as a Ray job and follow it. Running it again resumes from the last checkpoint."""
    from services.commands.distill import stop_recipe, submit_recipe
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        if stop:
            stopped = stop_recipe(checked, run_name=run_name, dashboard=ray_address)
            print_line(f"{stopped}: stopped" if stopped else f"no run {run_name} is running")
            raise typer.Exit(0 if stopped else 1)
        code = submit_recipe(
            checked, run_name=run_name, start_over=start_over, follow=not detach, dashboard=ray_address, console=out
        )
    raise typer.Exit(code)


def evaluate(
    recipe: RecipeArgument,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Hugging Face folders; default the target before training and all trained models."),
    ] = None,
    set_: SetOption = None,
    split: Annotated[str, typer.Option(help="Split of the recipe's corpus.")] = "held_out",
    sources: Annotated[bool, typer.Option(help="Score the sources' models too, here, with transformers.")] = False,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder of lm-evaluation-harness tasks to run as well; needs the extra lm-eval.")
    ] = None,
) -> None:
    """Score models: nats per byte and next-token accuracy on a split of the recipe's corpus, by domain."""
    from services.cli.tables import show_evaluation
    from services.commands.evaluate import evaluate as score

    with user_errors():
        checked = read_recipe(recipe, set_)
        evaluation = score(checked, folders or [], split, sources=sources, tasks=tasks, print_line=print_note)
        show_evaluation(evaluation, out)


def runs(folder: Annotated[Path, typer.Argument(help="Where recipes put their runs.")] = Path("runs")) -> None:
    """List training runs with their progress."""
    from services.cli.tables import show_runs
    from services.evaluation.report.find_runs import find_runs

    with user_errors():
        if not folder.is_dir():
            raise RecipeError(f"{folder}: no such folder")
        show_runs(find_runs(folder), out)


def report(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/quickstart.")],
) -> None:
    """Write report.md and report.html of a run: scores, curves, weights, throughput."""
    from services.evaluation.report.report import write_report

    with user_errors():
        print_line(str(write_report(run_folder)))


def quickstart(set_: SetOption = None) -> None:
    """Serve two real models, fuse them into a small target, and compare it with one trained without them."""
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        from services.cli.tables import show_quickstart
        from services.commands.quickstart import run  # imports Ray, which reads its mode then

        show_quickstart(run(read_recipe("quickstart", set_), out), out)
