"""`fusion distill`: hand the recipe's training to Ray's job API."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from services.commands.prepare import prepare
from services.commands.submitted import dashboard_of
from services.deploy.local_ray import deployments
from services.jobs.ray_job import job_name, stop, submit
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe, RecipeError


def submit_recipe(
    recipe: Recipe,
    *,
    run_name: str,
    start_over: bool = False,
    follow: bool = True,
    detach_on_interrupt: bool = True,
    dashboard: str | None = None,
    console: Console | None = None,
) -> int:
    """Prepare missing files, submit the run and follow it; return its exit code.

    The request is kept in the run's folder as submitted.yaml, and as recipe.yaml once the run has taken it on: a later
    change of the file, or a request that is refused, changes nothing about a run under way.
    """
    recipe_file = recipe.training_folder(run_name) / "submitted.yaml"
    _check_served(recipe)
    dashboard = dashboard or dashboard_of(recipe)
    prepare(recipe, save=False)
    recipe.save(recipe_file)
    entrypoint = ["python", "-m", "services.distill", "--recipe", str(recipe_file.absolute()), "--run-name", run_name]
    if start_over:
        entrypoint.append("--start-over")
    return submit(
        entrypoint,
        name=job_name(recipe.name, run_name),
        dashboard=dashboard,
        env=recipe.trackers.environment(),
        follow=follow,
        detach_on_interrupt=detach_on_interrupt,
        console=console,
    )


def stop_recipe(recipe: Recipe, *, run_name: str, dashboard: str | None = None) -> str | None:
    """Stop the run's job; return its submission id, None when none runs."""
    return stop(job_name(recipe.name, run_name), dashboard=dashboard or dashboard_of(recipe))


def _check_served(recipe: Recipe) -> None:
    """Refuse sections that differ from those of the running services: the run takes its windows from these."""
    for deployment in deployments():
        if deployment.name != recipe.name:
            continue
        asked, served = (
            # What decides no window may change.
            one.model_dump(by_alias=True, exclude={"corpus": {"workers"}, "recall": {"train"}})
            for one in (recipe, load_recipe(deployment.recipe))
        )
        sections = ["corpus", "sources", "target", "fusion", "service"]
        for section in [*sections, "recall"] if recipe.corpus.recall is not None else sections:
            if (key := _first_difference(section, asked[section], served[section])) is not None:
                raise RecipeError(
                    f"{key}: differs from what is up; `fusion down {recipe.name}` and `fusion up` with the change"
                )


def _first_difference(key: str, asked: Any, served: Any) -> str | None:
    """Return the dotted key of the first setting that differs; None when all are the same."""
    if isinstance(asked, dict) and isinstance(served, dict):
        parts = [(str(name), asked.get(name), served.get(name)) for name in sorted({*asked, *served}, key=str)]
    elif isinstance(asked, list | tuple) and isinstance(served, list | tuple) and len(asked) == len(served):
        parts = [(str(index), *pair) for index, pair in enumerate(zip(asked, served, strict=True))]
    else:
        return None if asked == served else key
    return next((found for name, *pair in parts if (found := _first_difference(f"{key}.{name}", *pair))), None)
