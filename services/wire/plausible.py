"""What no working model answers: sources look before a block goes out, the fusion service at what arrives.

Shape legend: T rows, K candidates.
"""

from __future__ import annotations

import math

import numpy as np

from fusion_core.arrays import Float32

_EXCESS_MASS = 1e-2
_SAME_NATS = 1e-2
"""Above what float16 rounds on the wire."""
_NEAR_UNIFORM_NATS = 0.7
"""The lm_head may be padded beyond the tokenizer's ids, so 1/V is known to a factor of two only."""


def implausible(gold_T: Float32, logprobs_TK: Float32, vocabulary_size: int) -> str | None:
    """What no working model answers: NaN, infinities, more than all mass, or 1/V for everything. None when sound."""
    best_T = logprobs_TK.max(axis=1)  # NaN where there is one, and NaN fails every comparison
    if not (gold_T > -np.inf).all() or not (best_T > -np.inf).all():
        return "the model answers with NaN or infinite log-probabilities"
    most = float(np.exp(logprobs_TK).sum(axis=1).max())
    if not most <= 1 + _EXCESS_MASS or not gold_T.max() <= _EXCESS_MASS:
        return f"the model's probabilities sum to {most:.3f}, more than one"
    if best_T.max() < -math.log(vocabulary_size) + _NEAR_UNIFORM_NATS:
        spread_T = best_T - np.minimum(logprobs_TK.min(axis=1), gold_T)
        if spread_T.max() < _SAME_NATS:
            return "the model gives every token the same probability, 1/V: its weights are lost"
    return None
