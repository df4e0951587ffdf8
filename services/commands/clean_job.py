"""Entrypoint of the Ray job of `fusion corpus`: `python -m services.commands.clean_job --recipe FILE`.

Exit codes: 0 cleaned, 1 a worker failed, 2 the recipe or its files do not allow it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import err, print_line, read_recipe, user_errors


def main(recipe: Annotated[str, typer.Option(help="Recipe file.")]) -> None:
    """Clean the files of section `curate` with tasks on every core of the cluster that this job runs on."""
    import ray

    from services.commands.clean import clean_recipe, lines_of
    from services.corpus.cleaning.tasks import run_on_ray

    with user_errors():
        ray.init(address="auto", log_to_driver=False)
        for line in lines_of(clean_recipe(read_recipe(recipe, None), run_on_ray, err)):
            print_line(line)


if __name__ == "__main__":
    typer.run(main)
