"""`fusion recall train`: hand the training of a recipe's judge to Ray's job API, or do it in this process."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from services.commands.submitted import submit_training
from services.models.catalogue import resolve_model
from services.recall.config import RecallConfig
from services.recall.job import JudgeJob, run
from services.recall.training_config import JudgeTrainingConfig
from services.recipes.recipe import Recipe, RecipeError, check_run_name


def training_sections(recipe: Recipe) -> tuple[RecallConfig, JudgeTrainingConfig]:
    """Return the sections `recall` and `recall.train`; raises RecipeError where the recipe has none."""
    if recipe.recall is None or recipe.recall.train is None:
        raise RecipeError("recall.train: the recipe has no such section; it names the files to learn from")
    return recipe.recall, recipe.recall.train


def judge_job(recipe: Recipe, run_name: str) -> JudgeJob:
    """Return the training run that a recipe describes; raises RecipeError naming the key that is wrong."""
    _, config = training_sections(recipe)
    try:
        resolve_model(config.encoder)
    except ValueError as error:
        raise RecipeError(f"recall.train.encoder: {error}") from error
    folder, source = run_folder(recipe, run_name), _source(recipe, config)
    return JudgeJob(run_name, folder, config, recipe.to_yaml(), source, recipe.trackers)


def _source(recipe: Recipe, config: JudgeTrainingConfig) -> tuple[str, str] | None:
    """Return address and application of the source that gives the labels; None where spans do."""
    if config.labels is None:
        return None
    for source in recipe.sources:
        if source.name == config.labels.source:
            endpoint = recipe.endpoint(source)
            return endpoint.address, endpoint.application
    names = ", ".join(source.name for source in recipe.sources)
    raise RecipeError(f"recall.train.labels.source: no source is called {config.labels.source}; there are {names}")


def run_folder(recipe: Recipe, run_name: str) -> Path:
    """Return the folder of a run of section `recall.train`; RecipeError for a name that leaves the recipe's folder."""
    check_run_name(run_name)
    return (recipe.recall_folder / run_name).absolute()


def train_judge(
    recipe: Recipe,
    *,
    run_name: str,
    start_over: bool = False,
    follow: bool = True,
    dashboard: str | None = None,
    console: Console | None = None,
) -> int:
    """Train, or submit the job that does and follow it; return its exit code.

    With `recall.train.num_workers: 0` training takes place in this process, without Ray.
    """
    job = judge_job(recipe, run_name)
    if job.config.num_workers == 0:
        train(job, start_over=start_over)
        return 0
    return submit_training(
        "recall",
        recipe,
        run_name,
        job.run_folder,
        start_over=start_over,
        follow=follow,
        dashboard=dashboard,
        console=console,
    )


def train(job: JudgeJob, *, start_over: bool = False) -> None:
    """Train, and say where the judge is; raises what `services.recall.job.run` raises."""
    done = "done" if run(job, start_over=start_over) else "trained already"
    print(f"[recall {job.run_name}] {done}; the judge is in {job.files.model}", flush=True)
