"""The totals and means of a run, from its metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from services.jobs.step_log import read_rows


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Totals of a stage of a curriculum, and nats per token over its last tenth; fusion None without fused rows."""

    name: str
    steps: int
    tokens: int
    windows: int
    clm: float | None
    fusion: float | None


@dataclass(frozen=True, slots=True)
class MixtureSummary:
    """Windows and tokens that the same sources scored, and the mean weights of these, weighted by tokens."""

    windows: int
    tokens: int
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Totals and means over the steps of a run.

    Attributes:
        steps, epochs, tokens, windows: consumed so far, repeats in later epochs included.
        train_seconds: sum of the steps' times; evaluation, checkpoints and start-up are not in it.
        tokens_per_second: tokens over train_seconds.
        wait_share: share of train_seconds that the trainer waited for the stream.
        clm, fusion: nats per token over the last tenth of the steps; fusion None without fused rows,
            clm where the target learned from its own answers alone.
        masked_share, covered_mass: weighted by tokens; None without fused rows.
        source_weights: per source, mean share of the mixture, weighted by tokens.
        stages: those of the curriculum that have begun.
        mixtures: windows that the same sources scored, a group each, by the sources' names.
    """

    steps: int
    epochs: int
    tokens: int
    windows: int
    train_seconds: float
    tokens_per_second: float
    wait_share: float
    clm: float | None
    fusion: float | None
    masked_share: float | None
    covered_mass: float | None
    source_weights: dict[str, float]
    stages: tuple[StageSummary, ...] = ()
    mixtures: tuple[MixtureSummary, ...] = ()


def summarise(metrics: Path) -> RunSummary | None:
    """Return the totals of a `metrics.jsonl`; None when it is absent or empty."""
    rows = read_rows(metrics)
    if not rows:
        return None
    tokens = sum(row["tokens"] for row in rows)
    seconds = sum(row["step_seconds"] for row in rows)
    weights: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, weight in row["source_weights"].items():
            weights[name] += weight * row["tokens"] / tokens
    clm, fusion = _last_losses(rows)
    return RunSummary(
        steps=rows[-1]["step"],
        epochs=rows[-1]["epoch"] + 1,
        tokens=tokens,
        windows=sum(row["windows"] for row in rows),
        train_seconds=seconds,
        tokens_per_second=tokens / seconds,
        wait_share=sum(row["data_wait_seconds"] for row in rows) / seconds,
        clm=clm,
        fusion=fusion,
        masked_share=_mean(rows, "masked_share"),
        covered_mass=_mean(rows, "covered_mass"),
        source_weights=dict(weights),
        stages=tuple(_stages(rows)),
        mixtures=tuple(_mixtures(rows)),
    )


def _stages(rows: list[dict[str, Any]]) -> Iterator[StageSummary]:
    for name, group in groupby((row for row in rows if "stage" in row), key=itemgetter("stage")):
        steps = list(group)
        tokens, windows = (sum(row[key] for row in steps) for key in ("tokens", "windows"))
        yield StageSummary(name, len(steps), tokens, windows, *_last_losses(steps))


def _mixtures(rows: list[dict[str, Any]]) -> Iterator[MixtureSummary]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for group in row.get("scored_by", ()):  # earlier versions did not write it
            groups[tuple(group["sources"])].append(group)
    for names in sorted(groups):
        windows, tokens = (sum(group[key] for group in groups[names]) for key in ("windows", "tokens"))
        sums = {name: sum(group["sources"][name] * group["tokens"] for group in groups[names]) for name in names}
        yield MixtureSummary(windows, tokens, {name: value / max(1, tokens) for name, value in sums.items()})


def _last_losses(rows: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return CLM and fusion loss over the last tenth of some steps."""
    last = rows[-max(1, len(rows) // 10) :]
    return _mean(last, "clm"), _mean(last, "fusion")


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean, weighted by tokens, over the rows that have a value."""
    having = [row for row in rows if row[key] is not None]
    tokens = sum(row["tokens"] for row in having)
    return sum(row[key] * row["tokens"] for row in having) / tokens if tokens else None
