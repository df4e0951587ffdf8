"""A forecast from scored windows: can fusing these sources help on this text, and which of them are needed where.

Shape legend: S sources, W windows, N segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion_core.arrays import Float64
from fusion_core.fusion.headroom import Segments, best_mixture, segment_nats
from services.evaluation.headroom.measured import FUSED, Measured
from services.evaluation.headroom.verdict import verdict
from services.evaluation.intervals import MIN_DOCUMENTS, compare_nats, windows_by_domain

MIXTURE, TARGET = "best mixture", "target"
NEGLIGIBLE = 0.001
"""Nats per byte that may be lost by leaving sources out."""
_LEAST = 0.001
"""Smallest weight in a prior: a source that has none could never gain any."""


def forecast(
    names: Sequence[str], windows: Sequence[Measured], *, strategy: str, target_nats_W: Float64 | None = None
) -> dict[str, Any]:
    """Compare sources, their best fixed mixture, the fused rows and the target on the same windows.

    Args:
        names: of the sources, in the windows' order.
        windows: at least one.
        strategy: that of the fused rows, for the verdict.
        target_nats_W: nats that the target itself loses on each window, where it was scored.

    Returns:
        `domains`, as `compare_nats` for the models "source NAME", "best mixture", "fused" and "target", and with, by
        domain: `mixture` (weights and nats per byte of the best fixed mixture there), `leave_out` (sources without
        which it loses less than `NEGLIGIBLE`; none in a domain of fewer than `MIN_DOCUMENTS` documents), `weights` of
        the fused rows, `disagree` (share of the rows that all sources have at which their likeliest tokens differ),
        `best_at` (share of these at which each source gives the realised token most) and `masked` (share of the rows).
        `prior` are the weights of the best mixture of all windows, for strategy `online`. And `verdict`.
    """
    documents, domains = [window.document for window in windows], [window.domain for window in windows]
    everything = best_mixture(Segments.joined([window.segments for window in windows])).weight_S
    nats_MW = {
        **{
            source_model(name): np.array([-window.segments.logprobs_SN[place].sum() for window in windows])
            for place, name in enumerate(names)
        },
        MIXTURE: np.array([segment_nats(window.segments, everything).sum() for window in windows]),
        FUSED: np.array([window.fused_nats for window in windows]),
    }
    if target_nats_W is not None:
        nats_MW[TARGET] = target_nats_W
    bytes_W = np.array([window.num_bytes for window in windows], dtype=np.int64)
    compared = compare_nats(nats_MW, bytes_W, documents, domains)
    for domain, places in windows_by_domain(documents, domains).items():
        compared[domain] |= _sources_in(names, [windows[place] for place in places], compared[domain]["documents"])
    prior = {name: round(max(weight, _LEAST), 3) for name, weight in _by_name(names, everything).items()}
    return {"domains": compared, "prior": prior, "verdict": verdict(names, compared, strategy)}


def source_model(name: str) -> str:
    """Return the name of a source among the models of a comparison."""
    return f"source {name}"


def dispensable(segments: Segments, negligible: float = NEGLIGIBLE) -> list[int]:
    """Return the sources, by place, that the best mixture can do without, the least needed first.

    One after the other is left out, as long as the mixture of those that remain loses less than `negligible` nats per
    byte on that of all.
    """
    kept = list(range(len(segments.logprobs_SN)))
    whole, gone = best_mixture(segments).nats_per_byte, list[int]()
    while len(kept) > 1:
        without = {
            source: best_mixture(segments.of([other for other in kept if other != source])).nats_per_byte
            for source in kept
        }
        least = min(kept, key=lambda source: without[source])
        if without[least] - whole >= negligible:
            break
        kept.remove(least)
        gone.append(least)
    return gone


def _sources_in(names: Sequence[str], windows: Sequence[Measured], num_documents: int) -> dict[str, Any]:
    segments = Segments.joined([window.segments for window in windows])
    best = best_mixture(segments)
    rows_W = np.array([window.num_rows for window in windows], dtype=np.float64)
    weight_S = rows_W @ np.stack([window.weight_S for window in windows]) / rows_W.sum()
    num_shared = max(1, sum(window.num_shared for window in windows))
    best_S = np.stack([window.best_S for window in windows]).sum(axis=0) / num_shared
    gone = dispensable(segments) if num_documents >= MIN_DOCUMENTS else []
    return {
        "mixture": {"weights": _by_name(names, best.weight_S), "nats_per_byte": best.nats_per_byte},
        "leave_out": [names[place] for place in gone],
        "weights": _by_name(names, weight_S),
        "disagree": sum(window.num_differ for window in windows) / num_shared,
        "best_at": _by_name(names, best_S),
        "masked": sum(window.num_masked for window in windows) / rows_W.sum(),
    }


def _by_name(names: Sequence[str], values_S: Float64) -> Mapping[str, float]:
    return dict(zip(names, values_S.tolist(), strict=True))
