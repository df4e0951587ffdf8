"""`fusion distill`: hands the recipe's training to Ray's job API."""

from __future__ import annotations

from pathlib import Path

from services.common.cluster import deployments
from services.distill.submit import submit
from services.recipes.prepare import prepare
from services.recipes.recipe import Recipe, RecipeError


def submit_recipe(
    recipe: Recipe,
    *,
    run_name: str,
    start_over: bool = False,
    follow: bool = True,
    detach_on_interrupt: bool = True,
    dashboard: str | None = None,
) -> int:
    """Prepares what is missing, submits the run and follows it; returns its exit code.

    The run's own resolved recipe lies in its folder, so that a later change of the file changes no run under way.
    """
    prepare(recipe)
    recipe_file = recipe.run_folder / run_name / "recipe.yaml"
    recipe.model_copy(update={"output_dir": str(Path(recipe.output_dir).absolute())}).save(recipe_file)
    entrypoint = ["python", "-m", "services.distill", "--recipe", str(recipe_file.absolute()), "--run-name", run_name]
    if start_over:
        entrypoint.append("--start-over")
    return submit(
        entrypoint,
        name=f"{recipe.name}-{run_name}",
        dashboard=dashboard or _dashboard(recipe),
        follow=follow,
        detach_on_interrupt=detach_on_interrupt,
    )


def _dashboard(recipe: Recipe) -> str:
    running = {deployment.name: deployment for deployment in deployments()}
    if recipe.name in running:
        return running[recipe.name].dashboard
    raise RecipeError(f"--ray-address: needed, because {recipe.name} is not up here; or run `fusion up` first")
