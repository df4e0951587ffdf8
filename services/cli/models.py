"""`fusion models`: the models of the catalogue on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import err, print_line, user_errors
from services.recipes.recipe import RecipeError

app = typer.Typer(help="Models on this machine.", no_args_is_help=True)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names of the catalogue, hf://ORG/NAME@REVISION or s3://BUCKET/FOLDER; default all known."),
    ] = None,
) -> None:
    """Make local Hugging Face folders of models: of the catalogue, of a hub, or of an object store."""
    from services.base.progress_bars import model_progress
    from services.models.catalogue import MODELS
    from services.models.fetch import fetch as fetch_model
    from services.models.reference import is_reference

    with user_errors():
        for name in names or list(MODELS):
            if name not in MODELS and not is_reference(name):
                raise RecipeError(f"{name}: not a known model; known are {', '.join(MODELS)}, and URLs (hf://, s3://)")
            with model_progress(err, name) as progress:
                folder = fetch_model(name, progress)
            print_line(f"{name}: {folder}")
