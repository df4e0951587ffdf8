"""`fusion recall`: the key blocks of long texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import (
    DetachOption,
    RayAddressOption,
    RecipeArgument,
    SetOption,
    out,
    print_line,
    read_recipe,
    user_errors,
)

if TYPE_CHECKING:
    from services.commands.recall.select import Found

app = typer.Typer(help="Find the key blocks of long texts, and answer from them.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Text in UTF-8.")]
_Question = Annotated[str, typer.Option(help="What is asked about the text.")]
_Judge = Annotated[str | None, typer.Option(metavar="FOLDER", help="Judge to run in this process.")]
_Address = Annotated[str | None, typer.Option(help="host:port of a recall service; default the one that is up.")]
_Application = Annotated[str | None, typer.Option(help="Serve application of that service.")]
_BudgetBytes = Annotated[int | None, typer.Option(help="Bytes of all key blocks together.")]
_Hops = Annotated[str | None, typer.Option(metavar="N,N", help="Blocks kept in mind after each hop, such as 3,5.")]
_RunName = Annotated[str, typer.Option(help="Folder of the run below `recall` in the recipe's.")]


@app.command()
def select(
    file: _File,
    question: _Question,
    judge: _Judge = None,
    address: _Address = None,
    application: _Application = None,
    budget_bytes: _BudgetBytes = None,
    hops: _Hops = None,
) -> None:
    """Print the key blocks of a text for a question, in its order."""
    with user_errors():
        from services.commands.recall.select import Lookup

        _show(Lookup(file, question, judge, address, application, budget_bytes, hops).find())


@app.command()
def ask(
    file: _File,
    question: _Question,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Recipe of the sources; default the one that is up.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Source that answers; needed where there are several.")] = None,
    judge: _Judge = None,
    address: _Address = None,
    application: _Application = None,
    budget_bytes: _BudgetBytes = None,
    hops: _Hops = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
) -> None:
    """Print the key blocks of a text for a question, and the answer that a served model gives from them."""
    with user_errors():
        from services.commands.recall.select import Lookup, answer
        from services.wire.answer import Sampling

        lookup = Lookup(file, question, judge, address, application, budget_bytes, hops)
        chosen = read_recipe(recipe, None) if recipe is not None else None
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        found, answered = answer(lookup, chosen, source, sampling)
        _show(found)
        print_line(f"answer: {answered.strip()}")


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: _RunName = "trained",
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints and judge of the same run name.")] = False,
    detach: DetachOption = False,
    ray_address: RayAddressOption = None,
) -> None:
    """Train the judge of section `recall.train` as a Ray job. Running it again resumes from the last checkpoint."""
    from services.commands.recall.train import train_judge
    from services.deploy.local_ray import enable_ray_authentication

    with user_errors():
        enable_ray_authentication()
        checked = read_recipe(recipe, set_)
        code = train_judge(
            checked, run_name=run_name, start_over=start_over, follow=not detach, dashboard=ray_address, console=out
        )
    raise typer.Exit(code)


@app.command(name="eval")
def evaluate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    run_name: _RunName = "trained",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks that every way may name.")] = 5,
) -> None:
    """Show how often all relevant blocks of held-out questions are found: by the judge, and by ways without one."""
    with user_errors():
        from rich.table import Table

        from services.commands.recall.evaluate import evaluate_judge

        shares, file = evaluate_judge(read_recipe(recipe, set_), run_name, blocks)
        table = Table("way", "questions", "all found", "95 % interval")
        for found in shares:
            table.add_row(found.way, str(found.questions), f"{found.share:.3f}", f"{found.low:.3f} to {found.high:.3f}")
        out.print(table)
        print_line(f"written to {file}")


def _show(found: list[Found]) -> None:
    from services.commands.answers.chat import printable

    for block in found:
        kept = f"hop {block.hop}" if block.hop else "fills the budget"
        print_line(f"bytes {block.start_byte} to {block.end_byte}, score {block.score:.3f}, {kept}")
        out.print(printable(block.text.encode()).strip(), soft_wrap=True)
        print_line("")
    if not found:
        print_line("no block fits the budget")
