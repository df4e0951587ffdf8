"""`fusion quickstart`: two real models served, fused into a third vocabulary, and a small target taught by the stream.

The target is trained twice on the same tokens in the same order: CLM only, and fused.
"""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console

from services.base.atomic import write_whole
from services.base.errors import RunFailedError
from services.base.progress_bars import model_progress
from services.base.version import git_revision
from services.commands.distill import submit_recipe
from services.commands.evaluate import evaluate_folder, evaluate_sources, split_windows, write_evaluation
from services.commands.prepare import prepare
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.deploy.up import check_free, temporarily_up
from services.evaluation.controls import CLM_ONLY, FUSED
from services.evaluation.report.report import write_report
from services.fusion.client import FusionClient
from services.jobs.step_log import read_rows
from services.models.fetch import fetch
from services.recipes.recipe import Recipe
from services.recipes.resolve import models_to_fetch


def run(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Run everything, leave nothing running, and return the summary, which summary.json holds as well.

    Raises RunFailedError naming what failed.
    """
    started = time.monotonic()

    def print_line(line: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {line}", soft_wrap=True)

    check_free(recipe)
    for model in models_to_fetch(recipe):
        with model_progress(console, model) as progress:
            fetch(model, progress)
    recipe_file = prepare(recipe, print_line, save=False)
    corpus = Corpus.open(recipe.corpus_folder)
    with temporarily_up(recipe, recipe_file, console) as deployment:
        client = FusionClient(deployment.grpc_address, application=deployment.application)
        runs = {
            FUSED: recipe,
            CLM_ONLY: recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"lambda_": 1.0})}),
        }
        for name, variant in runs.items():
            print_line(f"training {name} with lambda {variant.distill.lambda_}")
            code = submit_recipe(
                variant,
                run_name=name,
                start_over=True,
                detach_on_interrupt=False,
                dashboard=deployment.dashboard,
                console=console,
            )
            if code:
                raise RunFailedError(f"training {name} ended with exit code {code}; see {recipe.run_folder / name}")
        print_line(f"evaluating on {corpus.num_windows(HELD_OUT)} held-out windows")
        sources, fused_rows = evaluate_sources(client, corpus, HELD_OUT)
    windows = split_windows(corpus, HELD_OUT)
    scores = {name: evaluate_folder(recipe, windows, recipe.run_folder / name / "model") for name in runs}
    write_evaluation(recipe, corpus, HELD_OUT, windows, scores)
    nats = {name: score.mean for name, score in scores.items()}
    summary = {
        **_training_summary(recipe, corpus),
        "wall_seconds": round(time.monotonic() - started, 1),
        "nats_per_byte": {CLM_ONLY: nats[CLM_ONLY], FUSED: nats[FUSED], **sources},
        "nats_per_byte_fused_rows": fused_rows,
        "git_revision": git_revision(),
    }
    write_whole(recipe.run_folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_line(f"report in {write_report(recipe.run_folder)}")
    return summary


def _training_summary(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Return counts, and means over the steps of the fused run."""
    rows = read_rows(recipe.run_folder / FUSED / "metrics.jsonl")
    tokens = sum(row["tokens"] for row in rows)
    return {
        "name": recipe.name,
        "tokens": tokens,
        "windows": corpus.num_windows(TRAIN),
        "epochs": recipe.distill.epochs,
        "masked_share": sum(row["masked_share"] * row["tokens"] for row in rows) / tokens,
        "covered_mass": sum(row["covered_mass"] * row["tokens"] for row in rows) / tokens,
    }
