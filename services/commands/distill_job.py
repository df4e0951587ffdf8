"""Entrypoint of the Ray job: `python -m services.distill --recipe FILE [--run-name NAME] ...`.

Works under `ray job submit`, and on its own with a Ray of its own. Exit codes: 0 trained, 1 training failed, 2 the
recipe or the services do not allow it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.distill.job import DistillJob
from services.fusion.result_settings import result_settings
from services.jobs.ray_workers import exit_codes

if TYPE_CHECKING:
    from services.recipes.recipe import Recipe


def job_from_recipe(recipe: Recipe, run_name: str) -> DistillJob:
    """Return the training run that a recipe describes; its folder is `run_name` in the recipe's own."""
    return DistillJob(
        run_name=run_name,
        run_folder=recipe.training_folder(run_name).absolute(),
        target_folder=recipe.target_folder.absolute(),
        dataset=recipe.corpus.name,
        split="train",
        fusion_address=recipe.fusion_address,
        application=recipe.service.application,
        config=recipe.distill,
        recipe=recipe.to_yaml(),
        expected=result_settings(recipe.fusion_service(), {}),
        tracking=recipe.trackers,
    )


def main(
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a shipped recipe.")],
    run_name: Annotated[str, typer.Option(help="Folder of this run below the recipe's.")] = "fused",
    lambda_: Annotated[
        float | None, typer.Option("--lambda", help="Share of CLM; 1 trains without fusion and asks no source.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe; may be repeated.")] = None,
    start_over: Annotated[bool, typer.Option(help="Forget checkpoints of the same run name.")] = False,
) -> None:
    """Distil a target on Ray Train from the fused stream; goes on from the newest checkpoint of the same run name."""
    from services.distill.driver import run
    from services.recipes.load import load_recipe, read_overrides

    with exit_codes():
        overrides = read_overrides(set_ or ())
        if lambda_ is not None:
            overrides["distill.lambda"] = lambda_
        job = job_from_recipe(load_recipe(recipe, overrides), run_name)
        run(job, start_over=start_over)
    print(f"[distill {run_name}] done; the model is in {job.files.model}", flush=True)


if __name__ == "__main__":
    typer.run(main)
