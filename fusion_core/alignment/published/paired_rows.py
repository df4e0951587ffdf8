"""Projected rows from paired tokens: the last step of all published methods, once each has filled its rows.

Shape legend: S source tokens, T target tokens, M entries per row.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.realised import LOWEST_LOGPROB, carry_realised, finite_logprobs
from fusion_core.arrays import Float32, Float64, Int32
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding


def finish_rows(
    block: Block,
    target: Encoding,
    source_of_T: Int32,
    ids_TM: Int32,
    probs_TM: Float32,
    tail_T: Float64,
    carry: bool,
) -> ProjectedRows:
    """Mask the rows without a partner and set the realised tokens' probabilities.

    A masked row's `gold_T` is the log-probability of the source tokens that start within the target token.

    Args:
        source_of_T: the source token of every target token, -1 for none: such rows are masked.
        ids_TM, probs_TM, tail_T: the filled rows, changed in place; every row has a free place behind its entries.
        carry: give every realised token the exact probability that the source gave its own realised token, and rescale
            the rest; else it keeps the mass that the mapping moved onto it. Without any, it is an entry of probability
            0, and its `gold_T` is LOWEST_LOGPROB.
    """
    mask_T = source_of_T >= 0
    if not carry:
        ids_TM[~mask_T], probs_TM[~mask_T], tail_T[~mask_T] = -1, 0.0, 1.0
    covered_T = np.where(mask_T, 1.0 - tail_T, 0.0).astype(np.float32)
    gold_T = _loss_of_bytes(block, target)
    if carry:
        gold_T[mask_T] = finite_logprobs(block.gold_T)[source_of_T[mask_T]]
        carry_realised(target.token_ids_T, gold_T, mask_T, ids_TM, probs_TM, tail_T)
    else:
        realised_TM = (ids_TM == target.token_ids_T[:, None]) & mask_T[:, None]
        absent_T = np.flatnonzero(mask_T & ~realised_TM.any(axis=1))
        ids_TM[absent_T, (ids_TM[absent_T] >= 0).sum(axis=1)] = target.token_ids_T[absent_T]
        moved_T = np.where(realised_TM, probs_TM, 0.0).sum(axis=1, dtype=np.float64)
        supported_T = moved_T > 0
        gold_T[mask_T] = LOWEST_LOGPROB
        gold_T[supported_T] = np.log(moved_T[supported_T])
    return ProjectedRows(
        ids_TM=ids_TM,
        probs_TM=probs_TM,
        tail_T=tail_T.astype(np.float32),
        gold_T=np.minimum(gold_T, 0.0).astype(np.float32),
        mask_T=mask_T,
        covered_T=covered_T,
    )


def _loss_of_bytes(block: Block, target: Encoding) -> Float64:
    """Return the log-probability of the source tokens that start within each target token: float64 [T]."""
    starts_S = np.concatenate([[0], block.byte_ends_T[:-1]])
    starts_T = np.concatenate([[0], target.byte_ends_T[:-1]])
    if not target.num_tokens:
        return np.zeros(0)
    owner_S = np.maximum(np.searchsorted(starts_T, starts_S, side="right") - 1, 0)
    return np.bincount(owner_S, finite_logprobs(block.gold_T), minlength=target.num_tokens).astype(np.float64)
