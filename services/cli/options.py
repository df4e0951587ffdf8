"""What the commands share: consoles, the options that name a recipe, and how a user's mistake ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from services.base.errors import RunFailedError, ServiceError
from services.base.home import FetchError
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe, RecipeError

out = Console()
err = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as distill.lambda=0.5.")
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Mistakes in input, recipe or environment: a message without a traceback."""
    try:
        yield
    except (ServiceError, FetchError, ValueError, OSError) as error:
        err.print("[red]error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, RunFailedError) else 2) from error


def read_recipe(name_or_path: str, settings: list[str] | None) -> Recipe:
    import yaml

    overrides: dict[str, Any] = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {setting}: expected KEY=VALUE")
        overrides[key] = yaml.safe_load(value)
    return load_recipe(name_or_path, overrides)
