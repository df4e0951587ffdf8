"""The command line: `fusion COMMAND`. Every mistake of the user ends with exit code 2 and one message on stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer

from services.cli import answers, corpus, models, posttraining, scoring, serving, training, verifying
from services.cli.analysis.commands import cloze, export, headroom, view
from services.cli.beside.recall import app as recall_app
from services.cli.k8s import app as k8s_app
from services.cli.options import RecipeArgument, SetOption, out, print_line, read_recipe, user_errors
from services.cli.reward.app import app as reward_app

app = typer.Typer(
    help="Fuse the next-token distributions of several LLMs into one target.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _before_any_command() -> None:
    # So that `finally` runs, and with it the end of what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def validate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe and all that it names, without starting anything."""
    from services.recipes.validate import check_recipe

    with user_errors():
        checked = read_recipe(recipe, set_)
        check_recipe(checked)
        num_sources = len(checked.sources)
        sources = f"{num_sources} source" if num_sources == 1 else f"{num_sources} sources"
        print_line(f"{recipe}: good; {sources}, run folder {checked.run_folder}")


def doctor() -> None:
    """Check this machine: versions, engines, models, ports, memory, disk."""
    from services.cli.doctor import show_checks

    with user_errors():
        good = show_checks(out)
    if not good:
        raise typer.Exit(1)


_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"quickstart": training.quickstart, "validate": validate, "doctor": doctor},
    "Corpus": {"corpus": corpus.corpus},
    "Services": {"up": serving.up, "status": serving.status, "fetch": serving.fetch, "down": serving.down},
    "Store": {"capture": scoring.capture, "backfill": scoring.backfill},
    "Answers": {"sample": answers.sample, "chat": answers.chat, "verify": verifying.verify},
    "Training": {
        "headroom": headroom,
        "view": view,
        "export": export,
        "distill": training.distill,
        "posttrain": posttraining.posttrain,
        "cloze": cloze,
        "eval": training.evaluate,
        "runs": training.runs,
        "report": training.report,
        "upcycle": models.upcycle,
    },
}
"""Commands by name, under the heading of `fusion --help` that lists them."""

for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(models.app, name="models", rich_help_panel="Machines")
app.add_typer(reward_app, name="reward", rich_help_panel="Training")
app.add_typer(k8s_app, name="k8s", rich_help_panel="Machines")
app.add_typer(recall_app, name="recall", rich_help_panel="Answers")


if __name__ == "__main__":
    app()
