"""Nats per byte on a split: of Hugging Face folders, and of the sources through the fusion service."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.common.corpus import Corpus, prepare_corpus
from services.common.models import resolve_model
from services.distill.evaluate import nats_per_byte
from services.fusion.client import FusionClient, StreamRequest
from services.recipes.recipe import Recipe, RecipeError


def evaluate_folder(recipe: Recipe, corpus: Corpus, folder: Path, split: str) -> float:
    """Nats per byte of a model on a split, every window on its own behind the model's BOS."""
    scores = nats_per_byte(
        folder, list(corpus.texts(split)), device=recipe.distill.device, torch_threads=recipe.distill.torch_threads
    )
    return scores.mean


def evaluate_sources(client: FusionClient, corpus: Corpus, split: str) -> tuple[dict[str, float], float]:
    """Nats per byte of every source on a split, and of their fusion, from one pass of the fused stream."""
    nats: dict[str, float] = {}
    fused, num_bytes = 0.0, 0
    for window in client.stream(StreamRequest(dataset=corpus.name, split=split, seed=0)):
        block = window.block
        num_bytes += len(block.text_bytes)
        fused += block.nats_per_byte * len(block.text_bytes)
        for share in block.shares:
            nats[share.name] = nats.get(share.name, 0.0) + share.nats_per_byte * len(block.text_bytes)
    return {name: total / num_bytes for name, total in nats.items()}, fused / num_bytes


def show_evaluation(recipe: Recipe, folders: Iterable[Path], split: str, console: Console) -> None:
    """Prints a row per folder."""
    corpus = prepare_corpus(recipe.corpus, recipe.corpus_folder)
    if split not in corpus.splits:
        raise RecipeError(f"--split {split}: the corpus has {', '.join(corpus.splits)}")
    table = Table("model", "nats per byte", title=f"{corpus.name}/{split}", title_justify="left")
    for folder in folders:
        value = evaluate_folder(recipe, corpus, resolve_model(str(folder)), split)
        table.add_row(str(folder), f"{value:.4f}")
    console.print(table)
