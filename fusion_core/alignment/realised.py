"""The realised target tokens: their log-probabilities as finite numbers, and their exact place in their rows.

Shape legend: T target tokens, M entries of a target row.
"""

from __future__ import annotations

import math

import numpy as np

from fusion_core.arrays import Bool, Float32, Float64, Int32
from fusion_core.compiled import compiled

LOWEST_LOGPROB = -1e4
"""Log-probability in nats that replaces that of an impossible realised token: sums of it stay finite."""
_NO_MASS = 1e-200
"""Mass that cannot be scaled to anything: the factor would leave the range of float64."""


def finite_logprobs(logprobs_T: Float32 | Float64) -> Float64:
    """Return the realised tokens' log-probabilities, cut to LOWEST_LOGPROB..0: rounding can bring them above 0."""
    return np.clip(logprobs_T.astype(np.float64), LOWEST_LOGPROB, 0.0)


@compiled
def carry_realised(
    target_ids_T: Int32, gold_T: Float64, mask_T: Bool, ids_TM: Int32, probs_TM: Float32, tail_T: Float64
) -> None:
    """Give every realised target token its exact probability and rescale the rest of its row to the remainder.

    `gold_T` is in nats, at most 0. Masked rows are emptied: no entries, all mass in the tail. Rows need one free place
    at the end.
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
        if others > _NO_MASS:
            scale = (1.0 - realised) / others
            for m in range(width):
                if ids_TM[t, m] < 0:
                    break
                probs_TM[t, m] *= scale
            tail_T[t] *= scale
        else:
            tail_T[t] = 1.0 - realised
        probs_TM[t, place] = realised
