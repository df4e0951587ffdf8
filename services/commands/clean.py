"""`fusion corpus`: clean the files of section `curate`, on this machine or as a Ray job.

The job's entrypoint is `python -m services.commands.clean --recipe FILE`. Its exit codes: 0 cleaned, 1 a worker failed
or nothing is left, 2 the recipe or its files do not allow it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.base.errors import RunFailedError, ServiceError, SettingError
from services.base.files import Files
from services.base.progress_bars import plain_console, window_progress
from services.corpus.cleaning.page import page_of
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.tasks import RunAll, local_workers, run_on_ray
from services.evaluation.report.html_page import write_page
from services.jobs.ray_job import job_name, submit
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe, RecipeError

PAGE = "corpus.html"


def clean_here(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Clean with processes of this machine; return the ledger. RecipeError names a setting that cannot be honoured."""
    workers = recipe.curate.workers if recipe.curate is not None else None
    with local_workers(workers or len(os.sched_getaffinity(0))) as run_all:
        return clean_recipe(recipe, run_all, console)


def clean_recipe(recipe: Recipe, run_all: RunAll, console: Console) -> dict[str, Any]:
    """Clean the recipe's files, and write the page beside the ledger, which is returned."""
    if recipe.curate is None:
        raise RecipeError("curate: the recipe has no such section; it names the files to clean")
    try:
        with window_progress(console, "shards") as progress:
            ledger = clean(recipe.curate, recipe.curated_location, run_all, progress)
    except SettingError as error:
        raise RecipeError(f"curate.{error}") from error
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / PAGE
        write_page(page_of(ledger, recipe.name), f"{recipe.name}: corpus", page)
        Files(recipe.curated_location, "curate.folder").write(PAGE, page.read_bytes())
    return ledger


def submit_cleaning(recipe: Recipe, dashboard: str, console: Console) -> int:
    """Run the cleaning as a job of a Ray cluster and follow it; return its exit code."""
    if recipe.curate is None:
        raise RecipeError("curate: the recipe has no such section; it names the files to clean")
    file = recipe.curated_folder.absolute() / "submitted.yaml"
    recipe.save(file)
    entrypoint = ["python", "-m", "services.commands.clean", "--recipe", str(file)]
    return submit(entrypoint, name=job_name(recipe.name, "corpus"), dashboard=dashboard, console=console)


def lines_of(ledger: dict[str, Any]) -> Iterator[str]:
    """Yield the ledger in lines: each step with its reasons, the sum, and the time that sources are spared."""
    for entry in ledger["steps"]:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in entry["dropped"].items())
        others = ", ".join(f"{note} {number:,}" for note, number in entry["notes"].items() if number)
        joined = f", {entry['joined']:,} joined to others" if entry["joined"] else ""
        dropped = sum(entry["dropped"].values())
        line = f"{entry['step']}: {entry['documents_in']:,} in, {entry['kept']:,} kept, {dropped:,} dropped{joined}"
        yield line + (f" ({reasons})" if reasons else "") + (f"; {others}" if others else "")
    joined = f" + {ledger['joined']:,} joined to others" if ledger["joined"] else ""
    yield f"{ledger['documents_in']:,} documents = {ledger['kept']:,} kept + {ledger['dropped']:,} dropped{joined}"
    saved = ledger["bytes_in"] - ledger["bytes_kept"]
    yield f"{ledger['bytes_in']:,} bytes in, {ledger['bytes_kept']:,} kept; sources are spared {saved:,} bytes"
    if not ledger["seconds_saved"]:
        yield "No source was timed: set curate.seconds_per_megabyte to see the time saved."
    for name, seconds in ledger["seconds_saved"].items():
        yield f"{name}: {seconds:,.0f} s saved in each pass over the corpus"


def main(recipe: Annotated[str, typer.Option(help="Recipe file.")]) -> None:
    """Clean the files of section `curate` with tasks on every core of the Ray cluster that this job runs on."""
    import ray

    ray.init(address="auto", log_to_driver=False)
    try:
        for line in lines_of(clean_recipe(load_recipe(recipe), run_on_ray, plain_console())):
            print(line, flush=True)
    except (ServiceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, RunFailedError) else 2) from error


if __name__ == "__main__":
    typer.run(main)
