"""`fusion posttrain`: run the recipe's chain of stages, here or as a job of a Ray cluster."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from services.base.errors import SettingError
from services.commands.prepare import prepare
from services.jobs.ray_job import job_name, submit
from services.jobs.run_folder import RunFolder
from services.posttrain.chain import Chain
from services.posttrain.config import PosttrainConfig
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve


def run_chain(recipe: Recipe, console: Console, *, run_name: str, force: bool, start_over: bool) -> Path:
    """Run all stages that are not done, and return the promoted folder.

    Raises RecipeError for a mistake in section `posttrain`, RunFailedError when the gate holds a stage back.
    """
    config = _section(recipe)
    chain = Chain(
        config,
        start_folder(recipe, config),
        recipe.training_folder(run_name).absolute(),
        force=force,
        recipe=recipe.to_yaml(),
        tracking=recipe.trackers,
        note=lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False),
    )
    try:
        return chain.run(start_over=start_over)
    except SettingError as error:
        raise RecipeError(f"posttrain.{error}") from error


def submit_chain(
    recipe: Recipe, console: Console, *, run_name: str, force: bool, start_over: bool, dashboard: str, follow: bool
) -> int:
    """Submit the command as a job of the cluster behind `dashboard`; return its exit code."""
    _section(recipe)
    folder = recipe.training_folder(run_name)
    file = folder / "submitted.yaml"
    recipe.save(file)
    entrypoint = ["python", "-m", "services.cli.app", "posttrain", str(file.absolute()), "--run-name", run_name]
    entrypoint += [*(["--force"] if force else []), *(["--start-over"] if start_over else [])]
    return submit(
        entrypoint,
        name=job_name(recipe.name, run_name),
        dashboard=dashboard,
        env=recipe.trackers.environment(),
        follow=follow,
        console=console,
    )


def start_folder(recipe: Recipe, config: PosttrainConfig) -> Path:
    """Return the folder that the first stage starts from; RecipeError where it is not there."""
    if config.start == "model":
        if recipe.target.model is not None:
            return resolve("target.model", recipe.target.model)
        prepare(recipe, save=False)  # a target from scratch, which is made once
        return recipe.target_folder.absolute()
    trained = recipe.run_folder / config.start
    if (trained / "run.json").is_file():
        model = RunFolder(trained).model
        if not (model / "config.json").is_file():
            raise RecipeError(f"posttrain.start: run {config.start} is not at its end, {model} is not there")
        return model.absolute()
    return resolve("posttrain.start", config.start)


def _section(recipe: Recipe) -> PosttrainConfig:
    if recipe.posttrain is None:
        raise RecipeError("posttrain: the recipe has no such section; it names the stages and the gate")
    return recipe.posttrain
