"""Entrypoint of the Ray job of `fusion corpus`: `python -m services.commands.clean_job --recipe FILE`.

Exit codes: 0 cleaned, 1 a worker failed or nothing is left, 2 the recipe or its files do not allow it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from services.base.errors import RunFailedError, ServiceError
from services.base.progress_bars import plain_console


def main(recipe: Annotated[str, typer.Option(help="Recipe file.")]) -> None:
    """Clean the files of section `curate` with tasks on every core of the cluster that this job runs on."""
    import ray

    from services.commands.clean import clean_recipe, lines_of
    from services.corpus.cleaning.tasks import run_on_ray
    from services.recipes.load import load_recipe

    ray.init(address="auto", log_to_driver=False)
    try:
        for line in lines_of(clean_recipe(load_recipe(recipe), run_on_ray, plain_console())):
            print(line, flush=True)
    except (ServiceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, RunFailedError) else 2) from error


if __name__ == "__main__":
    typer.run(main)
