"""Entrypoint of the Ray job: `python -m services.commands.reward.train_job --recipe FILE [--run-name NAME]`.

Exit codes: 0 trained, 1 training failed, 2 the recipe does not allow it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from services.jobs.ray_workers import exit_codes
from services.recipes.recipe import TRAINED


def main(
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped recipe.")],
    run_name: Annotated[str, typer.Option(help="Folder of this run below `reward` in the recipe's.")] = TRAINED,
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints and model of the same run name.")] = False,
) -> None:
    """Train a reward model on Ray Train; goes on from the newest checkpoint of the same run name."""
    from services.commands.reward.train import reward_job, train
    from services.recipes.load import load_recipe

    with exit_codes():
        train(reward_job(load_recipe(recipe, {}), run_name), start_over=start_over)


if __name__ == "__main__":
    typer.run(main)
