"""Runs that are submitted as Ray jobs: the judge's and the reward model's, and the cluster of any job."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from services.deploy.local_ray import deployments
from services.jobs.ray_job import job_name, submit
from services.recipes.recipe import Recipe, RecipeError


def submit_training(
    section: str,
    recipe: Recipe,
    run_name: str,
    folder: Path,
    *,
    start_over: bool,
    follow: bool,
    dashboard: str | None,
    console: Console | None,
) -> int:
    """Submit `services.commands.SECTION.train_job` for a run, and follow it; return its exit code.

    The recipe is kept in the run's folder as submitted.yaml.
    """
    recipe_file = folder / "submitted.yaml"
    recipe.save(recipe_file)
    entrypoint = ["python", "-m", f"services.commands.{section}.train_job", "--recipe", str(recipe_file)]
    entrypoint += ["--run-name", run_name, *(["--start-over"] if start_over else [])]
    return submit(
        entrypoint,
        name=job_name(recipe.name, section, run_name),
        dashboard=dashboard or dashboard_of(recipe),
        env=recipe.trackers.environment(),
        follow=follow,
        console=console,
    )


def dashboard_of(recipe: Recipe) -> str:
    """Return the dashboard of the Ray cluster that runs the recipe's services; RecipeError where it is not up here."""
    running = {deployment.name: deployment for deployment in deployments()}
    if recipe.name in running:
        return running[recipe.name].dashboard
    raise RecipeError(f"--ray-address: needed, because {recipe.name} is not up here; or run `fusion up` first")
