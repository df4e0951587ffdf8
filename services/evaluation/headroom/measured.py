"""The part of a window's scores that a forecast needs: sums, and segments for the best mixture.

Shape legend: S sources, N segments of a window, T target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Float64, Int64
from fusion_core.blocks import Block
from fusion_core.fusion.disagreement import disagreement, mass_outside
from fusion_core.fusion.headroom import Segments, common_segments

SIZES = (1, 8, 16, 32, 64, 128, 1 << 30)
"""The numbers of candidates for which the mass outside is measured; the last one stands for all that there are."""
FUSED = "fused"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One window that all sources have scored.

    Attributes:
        document, domain: of the window; the domain is empty where the corpus names none.
        num_bytes: of its text.
        segments: the bytes between common ends of the sources' tokens.
        fused_nats: the nats that the fused rows lose on the text.
        num_rows, num_masked: of the fused block.
        num_shared, num_differ: rows that all sources have, and those at which their likeliest tokens differ.
        best_S: int64, the number of shared rows at which each source gives the realised token most.
        weight_S: float64, mean weight of each source in the fused rows.
        outside: by source, and for the fused rows, the mean mass outside the largest `SIZES` candidates.
    """

    document: str
    domain: str
    num_bytes: int
    segments: Segments
    fused_nats: float
    num_rows: int
    num_masked: int
    num_shared: int
    num_differ: int
    best_S: Int64
    weight_S: Float64
    outside: Mapping[str, Float64]


def measure(
    blocks: Mapping[str, Block], rows: Mapping[str, ProjectedRows], fused: Block, *, document: str, domain: str
) -> Measured:
    """Measure one window from the sources' own blocks, their rows in the target's vocabulary, and the fused block.

    All three name the sources in the same order. Raises ValueError as `common_segments`.
    """
    segments = common_segments(list(blocks.values()))
    differ_T, shared_T = disagreement(list(rows.values()))
    gold_ST = np.stack([source.gold_T for source in rows.values()])
    winners = gold_ST[:, shared_T].argmax(axis=0)
    own = {name: mass_outside(block, SIZES) for name, block in blocks.items()}
    return Measured(
        document=document,
        domain=domain,
        num_bytes=len(fused.text_bytes),
        segments=segments,
        fused_nats=-float(fused.gold_T[: fused.num_text_tokens].sum(dtype=np.float64)),
        num_rows=fused.num_tokens,
        num_masked=int((~fused.mask_T).sum()),
        num_shared=int(shared_T.sum()),
        num_differ=int(differ_T.sum()),
        best_S=np.bincount(winners, minlength=len(rows)),
        weight_S=np.array([share.weight for share in fused.shares]),
        outside={**own, FUSED: mass_outside(fused, SIZES)},
    )


def mean_outside(windows: Sequence[Measured], k: Mapping[str, int]) -> dict[str, dict[int, float]]:
    """Return the mean mass outside the largest candidates over all windows: by name, up to its k, which is included."""
    result = {}
    for name, most in k.items():
        rows_W = np.array([window.num_rows for window in windows], dtype=np.float64)
        outside_WK = np.stack([window.outside[name] for window in windows])
        known_W = ~np.isnan(outside_WK[:, 0])
        mean_K = rows_W[known_W] @ outside_WK[known_W] / max(1.0, rows_W[known_W].sum())
        result[name] = {size: float(mean) for size, mean in zip(SIZES, mean_K, strict=True) if size < most}
        last = next(place for place, size in enumerate(SIZES) if size >= most)
        result[name][most] = float(mean_K[last])
    return result
