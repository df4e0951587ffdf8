"""`fusion reward train`: hand the training of a recipe's reward model to Ray's job API, or do it in this process."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from services.base.errors import SettingError
from services.commands.submitted import submit_training
from services.models.catalogue import resolve_model
from services.recipes.recipe import Recipe, RecipeError, check_run_name
from services.reward.config import RewardConfig
from services.reward.train import RewardJob, run


def reward_section(recipe: Recipe) -> RewardConfig:
    """Return section `reward`; raises RecipeError where the recipe has none."""
    if recipe.reward is None:
        raise RecipeError("reward: the recipe has no such section; it names start, data and domains")
    return recipe.reward


def reward_job(recipe: Recipe, run_name: str) -> RewardJob:
    """Return the training run that a recipe describes; raises RecipeError naming the key that is wrong."""
    config = reward_section(recipe)
    try:
        start = resolve_model(config.start)
    except ValueError as error:
        raise RecipeError(f"reward.start: {error}") from error
    return RewardJob(run_name, run_folder(recipe, run_name), start, config, recipe.to_yaml(), recipe.trackers)


def run_folder(recipe: Recipe, run_name: str) -> Path:
    """Return the folder of a run of section `reward`; raises RecipeError for a name that leaves the recipe's folder."""
    check_run_name(run_name)
    return (recipe.reward_folder / run_name).absolute()


def train_reward_model(
    recipe: Recipe,
    *,
    run_name: str,
    start_over: bool = False,
    follow: bool = True,
    dashboard: str | None = None,
    console: Console | None = None,
) -> int:
    """Train, or submit the job that does and follow it; return its exit code.

    With `reward.num_workers: 0` training takes place in this process, without Ray.
    """
    job = reward_job(recipe, run_name)
    if job.config.num_workers == 0:
        train(job, start_over=start_over)
        return 0
    return submit_training(
        "reward",
        recipe,
        run_name,
        job.run_folder,
        start_over=start_over,
        follow=follow,
        dashboard=dashboard,
        console=console,
    )


def train(job: RewardJob, *, start_over: bool = False) -> None:
    """Train, and say where the model is; raises what `services.reward.train.run` raises, keys with their section."""
    try:
        trained = run(job, start_over=start_over)
    except SettingError as error:
        if error.setting.startswith("reward."):
            raise
        raise SettingError(f"reward.{error.setting}", error.problem) from error
    done = "done" if trained else "trained already"
    print(f"[reward {job.run_name}] {done}; the model is in {job.files.model}", flush=True)
