"""Sparse mixture of rows, cut to the largest candidates.

Shape legend: S sources, T target tokens, M entries of all sources side by side, K candidates kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Float32, Float64, Int32, Int64
from fusion_core.blocks import PADDING_ID
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, order_of_largest, place_of


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """One mixture per target token.

    Attributes:
        ids_TK: int32, the largest candidates in falling order, the realised token always among them; -1 where padded.
        probs_TK: float32, 0 where padded.
        tail_T: float64, the mass outside the candidates.
        covered_T: float64, the mass of all entries before the cut to K.
    """

    ids_TK: Int32
    probs_TK: Float32
    tail_T: Float64
    covered_T: Float64


def mix(rows: Sequence[ProjectedRows], weight_ST: Float64, target_ids_T: Int32, k: int) -> Mixture:
    """Return the mixture of the sources' rows; a row whose weights are all zero has no candidates, all mass in the
    tail."""
    num_tokens = len(target_ids_T)
    mixture = Mixture(
        ids_TK=np.full((num_tokens, k), PADDING_ID, dtype=np.int32),
        probs_TK=np.zeros((num_tokens, k), dtype=np.float32),
        tail_T=np.zeros(num_tokens),
        covered_T=np.zeros(num_tokens),
    )
    _mix_rows(
        np.concatenate([of_source.ids_TM for of_source in rows], axis=1),
        np.concatenate([of_source.probs_TM for of_source in rows], axis=1),
        np.cumsum([0, *(of_source.ids_TM.shape[1] for of_source in rows)], dtype=np.int64),
        np.stack([of_source.tail_T for of_source in rows]),
        weight_ST,
        target_ids_T,
        mixture.ids_TK,
        mixture.probs_TK,
        mixture.tail_T,
        mixture.covered_T,
    )
    return mixture


@compiled
def _mix_rows(
    ids_TM: Int32,
    probs_TM: Float32,
    first_column_S1: Int64,
    tail_ST: Float32,
    weight_ST: Float64,
    target_ids_T: Int32,
    topk_ids_TK: Int32,
    topk_probs_TK: Float32,
    tail_T: Float64,
    covered_T: Float64,
) -> None:
    """Fill the last four arrays, the fields of a `Mixture`, row by row.

    Source s owns the columns first_column_S1[s]..first_column_S1[s+1]-1, and its entries end at the first -1.
    """
    k, width = topk_ids_TK.shape[1], ids_TM.shape[1]
    keys = np.full(num_slots(width + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    ids, sums = np.empty(width + 1, dtype=np.int32), np.empty(width + 1, dtype=np.float32)
    bucket, order = np.empty(width + 1, dtype=np.int32), np.empty(width + 1, dtype=np.int32)

    for t in range(weight_ST.shape[1]):
        # The realised token has the first place, so that it is found again after the cut.
        ids[0], sums[0] = target_ids_T[t], 0.0
        num_entries = 1 + place_of(keys, places, t, target_ids_T[t], 0)
        num_entries, tail, total_weight = _add_sources(
            t, ids_TM, probs_TM, first_column_S1, tail_ST, weight_ST, keys, places, ids, sums, num_entries
        )
        if total_weight <= 0.0:
            tail_T[t] = 1.0
            continue
        num_kept = _order_with_realised(sums, num_entries, k, bucket, order)
        covered, kept_mass = 0.0, 0.0
        for m in range(num_entries):
            covered += sums[m]
        for j in range(num_kept):
            topk_ids_TK[t, j], topk_probs_TK[t, j] = ids[order[j]], sums[order[j]]
            kept_mass += sums[order[j]]
        covered_T[t] = covered
        tail_T[t] = tail + max(0.0, covered - kept_mass)


@compiled
def _add_sources(
    t: int,
    ids_TM: Int32,
    probs_TM: Float32,
    first_column_S1: Int64,
    tail_ST: Float32,
    weight_ST: Float64,
    keys: Int64,
    places: Int32,
    ids: Int32,
    sums: Float32,
    num_entries: int,
) -> tuple[int, float, float]:
    """Add row t of every source to `sums`, by id; return the number of ids, the mixed tail and the sum of weights."""
    tail, total_weight = 0.0, 0.0
    for s in range(weight_ST.shape[0]):
        weight = weight_ST[s, t]
        if weight <= 0.0:
            continue
        total_weight += weight
        tail += weight * tail_ST[s, t]
        for m in range(first_column_S1[s], first_column_S1[s + 1]):
            if ids_TM[t, m] < 0:
                break
            place = place_of(keys, places, t, ids_TM[t, m], num_entries)
            if place == num_entries:
                ids[place], sums[place] = ids_TM[t, m], 0.0
                num_entries += 1
            sums[place] += weight * probs_TM[t, m]
    return num_entries, tail, total_weight


@compiled
def _order_with_realised(sums: Float32, num_entries: int, k: int, bucket: Int32, order: Int32) -> int:
    """Write the places of the k largest entries to `order`, place 0 (the realised token) always among them, and
    return how many there are."""
    num_kept = order_of_largest(sums, num_entries, k, bucket, order)
    for j in range(num_kept):
        if order[j] == 0:
            return num_kept
    order[num_kept - 1] = 0
    return num_kept
