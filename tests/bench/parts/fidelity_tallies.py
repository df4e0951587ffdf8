"""Figures of one document's mapped rows, and of several documents together, with intervals.

Shape legend: T target tokens, U ids of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from tests.bench.parts.fidelity_models import Reading
from tests.fusion_core.alignment.byte.first_token import FirstTokenReference

EPSILON = 1e-3
"""Share of every mapped row that counts as spread evenly over all ids."""


@dataclass(frozen=True)
class Place:
    """A sampled target token with the truth about it."""

    t: int
    truth_U: np.ndarray
    reference: FirstTokenReference


@dataclass
class Tally:
    """Sums over one document; a bootstrap draws documents."""

    source_nats: float = 0.0
    mapped_nats: float = 0.0
    num_bytes: int = 0
    num_rows: int = 0
    num_supported: int = 0
    num_tokens: int = 0
    covered: float = 0.0
    in_top_k: float = 0.0
    top_1: list[bool] = field(default_factory=list)
    total_variation: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)


def dense(rows: ProjectedRows, t: int, size: int) -> np.ndarray:
    probs_U = np.zeros(size)
    present = rows.ids_TM[t] >= 0
    probs_U[rows.ids_TM[t][present]] = rows.probs_TM[t][present]
    return probs_U


def tally(
    rows: ProjectedRows, own: ProjectedRows, source: Reading, target: Reading, k: int | None, truths: list[Place]
) -> Tally:
    """The figures of one document. `own` has the source's exact loss of every target token (the chain rule)."""
    result = Tally()
    ids_T, size = target.encoding.token_ids_T, target.vocabulary.size
    mask_T = rows.mask_T & own.mask_T
    realised_T = np.where(rows.ids_TM == ids_T[:, None], rows.probs_TM, 0.0).sum(axis=1, dtype=np.float64)
    floored_T = (1.0 - EPSILON) * realised_T + EPSILON / size
    result.num_tokens, result.num_rows = len(mask_T), int(mask_T.sum())
    result.source_nats = float(-own.gold_T[mask_T].sum(dtype=np.float64))
    result.mapped_nats = float(-np.log(floored_T[mask_T]).sum())
    result.num_bytes = int(np.diff(target.encoding.byte_ends_T, prepend=0)[mask_T].sum())
    result.num_supported = int((realised_T[mask_T] > 0).sum())
    result.covered = float(rows.covered_T[mask_T].sum(dtype=np.float64))
    in_top_k = 1.0 if k is None else float(np.exp(source.block(k).topk_logprobs_TK).sum(axis=1).mean())
    result.in_top_k = in_top_k * result.num_rows
    for place in truths:
        if rows.mask_T[place.t]:
            row_U = dense(rows, place.t, size)
            outside = max(0.0, 1.0 - place.truth_U.sum())
            tail = max(0.0, 1.0 - row_U.sum())
            result.total_variation.append((np.abs(row_U - place.truth_U).sum() + abs(tail - outside)) / 2)
            result.top_1.append(bool(row_U.argmax() == place.truth_U.argmax()))
            # The row's tail counts as spread evenly over what is no entry.
            spread = np.where(row_U > 0, row_U, tail / max(1, int((row_U == 0).sum())))
            likely = place.truth_U > 0
            ratio = place.truth_U[likely] / ((1.0 - EPSILON) * spread[likely] + EPSILON / size)
            result.divergence.append(float((place.truth_U[likely] * np.log(ratio)).sum()))
    return result


def interval(tallies: list[Tally], figure: Callable[[list[Tally]], float]) -> tuple[float, float]:
    """95 % of the figure when documents are drawn anew."""
    rng = np.random.default_rng(0)
    drawn = [figure([tallies[i] for i in rng.integers(0, len(tallies), len(tallies))]) for _ in range(1000)]
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def ratio(tallies: list[Tally]) -> float:
    own = sum(one.source_nats for one in tallies)
    return sum(one.mapped_nats for one in tallies) / own if own else float("nan")


def mean_of(name: str) -> Callable[[list[Tally]], float]:
    def mean(tallies: list[Tally]) -> float:
        values = [value for one in tallies for value in getattr(one, name)]
        return float(np.mean(values)) if values else float("nan")

    return mean


def share(tallies: list[Tally], part: str, whole: str) -> float:
    total = sum(getattr(one, whole) for one in tallies)
    return float(sum(getattr(one, part) for one in tallies) / total) if total else float("nan")
