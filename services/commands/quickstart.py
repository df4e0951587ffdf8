"""`fusion quickstart`: two real models served, fused into a third vocabulary, and a small target taught by the stream.

The target is trained twice on the same tokens in the same order: CLM only, and fused.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from services.base.errors import RunFailedError
from services.base.progress_bars import deployment_progress, model_progress
from services.base.version import git_revision
from services.commands.distill import submit_recipe
from services.commands.evaluate import evaluate_folder, evaluate_sources, write_evaluation
from services.commands.prepare import prepare
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.deploy.local_ray import Deployment
from services.deploy.up import check_free, up
from services.evaluation.controls import CLM_ONLY, FUSED
from services.evaluation.report.report import verdict, write_report
from services.fusion.client import FusionClient
from services.jobs.step_log import read_rows
from services.models.catalogue import MODELS
from services.models.fetch import fetch
from services.recipes.recipe import Recipe


def run(recipe: Recipe, console: Console) -> None:
    """Runs everything and leaves nothing running; raises RunFailedError with what failed."""
    started = time.monotonic()
    say = _teller(console, started)
    check_free(recipe)
    for source in recipe.sources:
        if source.model in MODELS:
            with model_progress(console, source.model) as progress:
                fetch(source.model, progress)
    recipe_file = prepare(recipe, say)
    corpus = Corpus.open(recipe.corpus_folder)
    with _serving(recipe, recipe_file, console) as deployment:
        client = FusionClient(deployment.grpc_address, application=deployment.application)
        runs = {
            FUSED: recipe,
            CLM_ONLY: recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"lambda_": 1.0})}),
        }
        for name, variant in runs.items():
            say(f"training {name} with lambda {variant.distill.lambda_}")
            code = submit_recipe(
                variant, run_name=name, start_over=True, detach_on_interrupt=False, dashboard=deployment.dashboard
            )
            if code:
                raise RunFailedError(f"training {name} ended with exit code {code}; see {recipe.run_folder / name}")
        say(f"evaluating on {corpus.num_windows(HELD_OUT)} held-out windows")
        sources, fused_rows = evaluate_sources(client, corpus, HELD_OUT)
    scores = {name: evaluate_folder(recipe, corpus, recipe.run_folder / name / "model", HELD_OUT) for name in runs}
    write_evaluation(recipe, corpus, HELD_OUT, scores)
    nats = {name: score.mean for name, score in scores.items()}
    summary = {
        **_training_summary(recipe, corpus),
        "wall_seconds": round(time.monotonic() - started, 1),
        "nats_per_byte": {CLM_ONLY: nats[CLM_ONLY], FUSED: nats[FUSED], **sources},
        "nats_per_byte_fused_rows": fused_rows,
        "fused_is_better": nats[FUSED] < nats[CLM_ONLY],
        "git_revision": git_revision(),
    }
    (recipe.run_folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(f"report in {write_report(recipe.run_folder)}")
    _show(summary, console)


def _show(summary: dict[str, Any], console: Console) -> None:
    nats = summary["nats_per_byte"]
    table = Table("model", "nats per byte", "", title="held-out text", title_justify="left")
    for name, value in sorted(nats.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.4f}", "target" if name in {CLM_ONLY, FUSED} else "source")
    console.print(
        f"{summary['tokens']:,} tokens in {summary['windows']} windows and {summary['epochs']} epochs, "
        f"{summary['wall_seconds']:.0f} s; masked {summary['masked_share']:.2%}, "
        f"covered mass {summary['covered_mass']:.3f}",
        highlight=False,
    )
    console.print(Markdown(verdict(nats) or ""))
    console.print(table)


def _training_summary(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """Counts and means over the steps of the fused run; its metrics become those of the whole."""
    metrics = recipe.run_folder / FUSED / "metrics.jsonl"
    shutil.copyfile(metrics, recipe.run_folder / "metrics.jsonl")
    rows = read_rows(metrics)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "name": recipe.name,
        "tokens": tokens,
        "windows": corpus.num_windows(TRAIN),
        "epochs": recipe.distill.epochs,
        "masked_share": sum(row["masked_share"] * row["tokens"] for row in rows) / tokens,
        "covered_mass": sum(row["covered_mass"] * row["tokens"] for row in rows) / tokens,
    }


@contextmanager
def _serving(recipe: Recipe, recipe_file: Path, console: Console) -> Iterator[Deployment]:
    with deployment_progress(console) as progress:
        deployment = up(recipe, recipe_file, progress)
    try:
        yield deployment
    finally:
        deployment.stop()


def _teller(console: Console, started: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {line}", highlight=False, markup=False, soft_wrap=True)

    return say
