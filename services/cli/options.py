"""Parts of all commands: consoles, the options that name a recipe, and the handling of a user's mistakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import typer
from rich.text import Text

from services.base.errors import RunFailedError, ServiceError
from services.base.home import FetchError
from services.base.progress_bars import plain_console
from services.recipes.load import load_recipe, read_overrides
from services.recipes.recipe import Recipe

out = plain_console()
err = plain_console(stderr=True)

print_line = partial(out.print, soft_wrap=True)
"""Print a line of the result on stdout, unbroken."""
print_note = partial(err.print, soft_wrap=True)
"""Print a line about the command's progress on stderr, unbroken."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as distill.lambda=0.5; may be repeated."),
]
DetachOption = Annotated[bool, typer.Option(help="Submit and return at once.")]
RayAddressOption = Annotated[
    str | None, typer.Option(help="Ray dashboard, http://host:8265; default what `fusion up` started.")
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the command on a mistake in input, recipe or environment: its message on stderr, no traceback.

    The exit code is 2; 1 when a run failed though everything asked for was right.
    """
    try:
        yield
    except (ServiceError, FetchError, ValueError, OSError) as error:
        print_note(Text("error:", style="red"), str(error))
        raise typer.Exit(1 if isinstance(error, RunFailedError) else 2) from error


def read_recipe(name_or_path: str, settings: list[str] | None) -> Recipe:
    """Load a recipe with the changes of `--set`; raises RecipeError naming the key."""
    return load_recipe(name_or_path, read_overrides(settings or ()))
