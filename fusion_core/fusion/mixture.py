"""Sparse mixture of rows, cut to the largest candidates.

Shape legend: S sources, T target tokens, M entries of all sources side by side, K candidates kept.
"""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Float32, Float64, Int32, Int64
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, order_of_largest, place_of


@compiled
def mix_rows(
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
    """Fills the K largest candidates of every mixture, in falling order, the realised token always among them.

    Source s owns the columns first_column_S1[s]..first_column_S1[s+1]-1, and its entries end at the first -1. Rows
    whose weights are all zero get no candidates and all mass in the tail. `covered_T` is the mass of all entries
    before the cut.
    """
    num_sources, num_tokens = weight_ST.shape
    k, width = topk_ids_TK.shape[1], ids_TM.shape[1]
    keys = np.full(num_slots(width + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    ids, sums = np.empty(width + 1, dtype=np.int32), np.empty(width + 1, dtype=np.float32)
    bucket, order = np.empty(width + 1, dtype=np.int32), np.empty(width + 1, dtype=np.int32)

    for t in range(num_tokens):
        # The realised token has the first place, so that it is found again after the cut.
        ids[0], sums[0] = target_ids_T[t], 0.0
        num_entries = 1 + place_of(keys, places, t, target_ids_T[t], 0)
        tail, total_weight = 0.0, 0.0
        for s in range(num_sources):
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
        if total_weight <= 0.0:
            tail_T[t] = 1.0
            continue
        kept = order_of_largest(sums, num_entries, k, bucket, order)
        realised_kept = False
        for j in range(kept):
            realised_kept = realised_kept or order[j] == 0
        if not realised_kept:
            order[kept - 1] = 0
        covered, kept_mass = 0.0, 0.0
        for m in range(num_entries):
            covered += sums[m]
        for j in range(kept):
            topk_ids_TK[t, j], topk_probs_TK[t, j] = ids[order[j]], sums[order[j]]
            kept_mass += sums[order[j]]
        covered_T[t] = covered
        tail_T[t] = tail + max(0.0, covered - kept_mass)
