"""Compiled loops of the byte projection before and after the hypotheses.

Shape legend: S tokens of the source, T target tokens, M entries of a target row, V source ids, B bytes of all source
ids together, N bytes of the text.
"""

from __future__ import annotations

import math

from fusion_core.arrays import Bool, Float32, Float64, Int32
from fusion_core.compiled import compiled


@compiled
def carry_realised(
    target_ids_T: Int32, gold_T: Float64, mask_T: Bool, ids_TM: Int32, probs_TM: Float32, tail_T: Float64
) -> None:
    """Gives every realised target token its exact probability and rescales the rest of its row to the remainder.

    Masked rows are emptied: no entries, all mass in the tail. Rows need one free place at the end.
    """
    num_tokens, width = ids_TM.shape
    for t in range(num_tokens):
        if not mask_T[t]:
            for m in range(width):
                ids_TM[t, m] = -1
                probs_TM[t, m] = 0.0
            tail_T[t] = 1.0
            continue
        place = 0
        while ids_TM[t, place] != target_ids_T[t] and ids_TM[t, place] >= 0:
            place += 1
        ids_TM[t, place] = target_ids_T[t]
        probs_TM[t, place] = 0.0
        others = tail_T[t]
        for m in range(width):
            if ids_TM[t, m] < 0:
                break
            others += probs_TM[t, m]
        realised = math.exp(gold_T[t])
        if others > 0.0:
            scale = (1.0 - realised) / others
            for m in range(width):
                if ids_TM[t, m] < 0:
                    break
                probs_TM[t, m] *= scale
            tail_T[t] *= scale
        else:
            tail_T[t] = 1.0 - realised
        probs_TM[t, place] = realised
