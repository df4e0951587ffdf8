"""Tables that commands print: a text's fused distribution, training runs, evaluations, the quickstart's models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.deploy.local_ray import deployments
from services.evaluation.controls import CLM_ONLY, FUSED, Training
from services.evaluation.intervals import ALL
from services.evaluation.report.find_runs import RunState
from services.evaluation.report.opening import verdict
from services.fusion.client import FusionClient
from services.recipes.load import load_recipe
from services.wire.passage import Passage


def show_runs(runs: Iterable[RunState], console: Console) -> None:
    """Print a row per training run."""
    table = Table("run", "step", "loss", "state", "last step", "revision")
    for run in runs:
        steps = f"{run.step:,}/{run.total_steps:,}" if run.total_steps else f"{run.step:,}"
        state = "done" if run.done else "not done"
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        table.add_row(str(run.folder), steps, loss, state, f"{run.changed:%Y-%m-%d %H:%M}", run.git_revision[:12])
    console.print(table if table.row_count else "no runs")


def show_fused(text: str, address: str, application: str, top: int, sources: list[str], console: Console) -> None:
    """Fuse a text and print its tokens as `show_block` does."""
    client = FusionClient(address, application=application, patience_seconds=0)
    # The end row predicts the token after the text, whether the document ends there or not.
    [block] = client.fuse([Passage(text.encode(), ends_document=True)], sources=sources)
    show_block(block, _served_vocabulary(block.vocabulary), top, console)


def show_block(block: Block, vocabulary: Vocabulary | None, top: int, console: Console) -> None:
    """Print the likeliest tokens at every place of a block's text and behind it; then the sources' weights.

    Without the `vocabulary` of the block's ids, candidates are shown as numbers.
    """
    names = _token_texts(block, vocabulary)
    table = Table(title=f"target vocabulary {block.vocabulary}", title_justify="left")
    table.add_column("token", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    for rank in range(min(top, block.k)):
        table.add_column(f"{rank + 1}.", overflow="fold")
    table.add_column("tail", justify="right", no_wrap=True)
    start = 0
    for row in range(block.num_tokens):
        end = int(block.byte_ends_T[row])
        token = block.text_bytes[start:end]
        behind = row == block.num_text_tokens
        cells = ["(next)", ""] if behind else [_quote(token), f"{math.exp(block.gold_T[row]):.3f}"]
        table.add_row(*cells, *_candidates(block, row, top, names), end_section=row == block.num_text_tokens - 1)
        start = end
    console.print(table)
    for share in block.shares:
        state = f"weight {share.weight:.3f}, {_decimals(share.nats_per_byte)} nats/byte"
        console.print(f"source {share.name}: {state if share.present else 'did not answer'}")
    masked = 1.0 - float(np.mean(block.mask_T))
    console.print(
        f"fused: {block.nats_per_byte:.3f} nats/byte, covered mass {_decimals(block.covered_mass)}, masked {masked:.1%}"
    )


def _decimals(value: float) -> str:
    """Return a number with three decimals; a dash for NaN, where no row of the block could be used."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def show_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Print a row per model and domain."""
    columns = ("domain", "model", "taught by", "nats per byte", "95 %", "accuracy")
    table = Table(*columns, title=f"{evaluation['corpus']}/{evaluation['split']}", title_justify="left")
    trainings = {name: Training.from_json(value) for name, value in evaluation["trainings"].items()}
    for domain, result in evaluation["domains"].items():
        ranked = sorted(result["models"].items(), key=lambda item: item[1]["nats_per_byte"]["value"])
        for model, values in ranked:
            nats, accuracy = values["nats_per_byte"], values["accuracy"]
            interval = "-" if nats["low"] is None else f"{nats['low']:.4f} to {nats['high']:.4f}"
            taught_by = str(trainings.get(model, ""))
            table.add_row(domain, model, taught_by, f"{nats['value']:.4f}", interval, f"{accuracy['value']:.3f}")
    console.print(table)
    if evaluation["tasks"]:
        console.print(_task_table(evaluation["tasks"]))
    everything = evaluation["domains"][ALL]
    console.print(f"{everything['bytes']:,} bytes in {everything['documents']} documents")


def _task_table(results: dict[str, Any]) -> Table:
    table = Table("task", "model", "metric", "value", title="lm-evaluation-harness", title_justify="left")
    for model, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                table.add_row(task, model, metric, f"{value:.4f}")
    return table


def show_quickstart(summary: dict[str, Any], console: Console) -> None:
    """Print the size of the run, the verdict, and nats per byte of every model on held-out text."""
    nats = summary["nats_per_byte"]
    table = Table("model", "nats per byte", "", title="held-out text", title_justify="left")
    for name, value in sorted(nats.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.4f}", "target" if name in {CLM_ONLY, FUSED} else "source")
    console.print(
        f"{summary['tokens']:,} tokens in {summary['windows']} windows and {summary['epochs']} epochs, "
        f"{summary['wall_seconds']:.0f} s; masked {summary['masked_share']:.2%}, "
        f"covered mass {summary['covered_mass']:.3f}",
    )
    console.print(Markdown(verdict(nats) or ""))
    console.print(table)


def _candidates(block: Block, row: int, top: int, names: dict[int, str]) -> list[str]:
    if not block.mask_T[row]:
        return ["(masked)"]
    ids, logprobs = block.topk_ids_TK[row, :top], block.topk_logprobs_TK[row, :top]
    shown = [
        f"{names[int(token_id)]} {math.exp(logprob):.3f}" if token_id >= 0 else ""
        for token_id, logprob in zip(ids, logprobs, strict=True)
    ]
    return [*shown, f"{math.exp(block.tail_T[row]):.3f}"]


def _token_texts(block: Block, vocabulary: Vocabulary | None) -> dict[int, str]:
    """Return the readable text of every candidate, by id."""
    ids = {int(i) for i in np.unique(block.topk_ids_TK) if i >= 0}
    if vocabulary is None:
        return {i: f"#{i}" for i in ids}
    control = {token_id: name for name, token_id in vocabulary.special_tokens.items()}
    return {i: _printable(control.get(i, "")) or _quote(vocabulary.token_bytes(i)) for i in ids}


def _quote(data: bytes) -> str:
    """Return a token's text with white space made visible."""
    text = data.decode("utf-8", errors="backslashreplace")
    return _printable(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))


def _printable(text: str) -> str:
    """Return a text with escapes for what a terminal would obey instead of print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _served_vocabulary(fingerprint: str) -> Vocabulary | None:
    """Return the target vocabulary of a deployment on this machine, by its fingerprint; None where none has it."""
    for deployment in deployments():
        folder = load_recipe(deployment.recipe).target_folder
        if folder.is_dir() and (vocabulary := Vocabulary.from_pretrained(folder)).fingerprint == fingerprint:
            return vocabulary
    return None
