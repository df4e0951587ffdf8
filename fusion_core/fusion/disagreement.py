"""Where projected sources disagree, and what a cut to k candidates leaves out.

Shape legend: S sources, T target tokens, K candidates of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Bool, Float64, Int32
from fusion_core.blocks import Block


def likeliest_ids(rows: ProjectedRows) -> Int32:
    """Return the likeliest target token of every row; -1 where it has none."""
    best_T1 = rows.probs_TM.argmax(axis=1)[:, None]
    ids_T: Int32 = np.take_along_axis(rows.ids_TM, best_T1, axis=1)[:, 0]
    return np.where(rows.mask_T, ids_T, np.int32(-1))


def disagreement(sources: Sequence[ProjectedRows]) -> tuple[Bool, Bool]:
    """Return the rows at which the sources' likeliest tokens differ, [T], and those that all sources have, [T].

    A row that a source does not have counts as no disagreement.
    """
    best_ST = np.stack([likeliest_ids(rows) for rows in sources])
    shared_T: Bool = np.all(best_ST >= 0, axis=0)
    differ_T: Bool = np.any(best_ST != best_ST[:1], axis=0) & shared_T
    return differ_T, shared_T


def mass_outside(block: Block, sizes: Sequence[int]) -> Float64:
    """Return for each number of candidates the mean probability outside that many largest, over unmasked rows.

    NaN where no row is unmasked. Sizes above the block's k count as k.
    """
    rows_T = block.mask_T
    if not rows_T.any():
        return np.full(len(sizes), np.nan)
    inside_TK = np.cumsum(np.exp(block.topk_logprobs_TK[rows_T].astype(np.float64)), axis=1)
    inside_TK = np.concatenate([np.zeros((len(inside_TK), 1)), inside_TK], axis=1)
    outside: Float64 = 1.0 - inside_TK[:, [min(size, block.k) for size in sizes]].mean(axis=0)
    return np.maximum(outside, 0.0)
