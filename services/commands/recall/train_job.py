"""Entrypoint of the Ray job: `python -m services.commands.recall.train_job --recipe FILE [--run-name NAME]`.

Exit codes: 0 trained, 1 training failed, 2 the recipe does not allow it.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from services.base.errors import ServiceError
from services.recipes.recipe import TRAINED


def main(
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped recipe.")],
    run_name: Annotated[str, typer.Option(help="Folder of this run below `recall` in the recipe's.")] = TRAINED,
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints and model of the same run name.")] = False,
) -> None:
    """Train a judge on Ray Train; goes on from the newest checkpoint of the same run name."""
    from ray.train import TrainingFailedError

    from services.commands.recall.train import judge_job, train
    from services.recipes.load import load_recipe

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(judge_job(load_recipe(recipe, {}), run_name), start_over=start_over)
    except (ServiceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except (TrainingFailedError, ArithmeticError) as error:
        print(f"error: training failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
