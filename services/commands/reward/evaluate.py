"""`fusion reward eval`: the held-out pairs of a recipe, scored under every domain's prompt."""

from __future__ import annotations

from pathlib import Path

from services.commands.reward.train import reward_section, run_folder
from services.recipes.recipe import Recipe, RecipeError
from services.reward.evaluate import RewardEvaluation, evaluate
from services.reward.model import RewardModel
from services.reward.pairs import read_pairs, split_pairs


def evaluate_run(recipe: Recipe, run_name: str) -> tuple[RewardEvaluation, Path]:
    """Return the evaluation of a run's model on the held-out pairs, and the file that it was written to.

    Raises RecipeError when there is no pair or no model, SettingError for data that cannot be read.
    """
    config, folder = reward_section(recipe), run_folder(recipe, run_name)
    try:
        _, held_out = split_pairs(read_pairs(config.data, config.domains), config.held_out_share)
    except ValueError as error:
        raise RecipeError(f"reward.{error}") from error
    if not held_out:
        raise RecipeError("reward.held_out_share: no pair is held out; raise it, or give more data")
    if not (folder / "model").is_dir():
        raise RecipeError(f"--run-name: there is no model in {folder} yet; `fusion reward train` makes it")
    found = evaluate(RewardModel.open(folder / "model", device=config.device), held_out)
    file = folder / "evaluation.json"
    found.save(file)
    return found, file
