"""Tell a working model's rows from a broken one's: sources check before a block goes out, readers when it arrives.

The decoder of blocks checks what can be known from the message alone: lengths, encodings, byte ends, UTF-8, that a row
and its tail sum to one. This module checks what needs the vocabulary and the request.

Shape legend: T rows, K candidates.
"""

from __future__ import annotations

import math

import numpy as np

from fusion_core.arrays import Float32, Int32
from fusion_core.blocks import PADDING_ID, Block

_EXCESS_MASS = 1e-2
_SAME_NATS = 1e-2
"""Largest difference in nats that counts as none; float16 rounds log-probabilities above -16 by less on the wire."""
_HALF_PRECISION = 2.0**-10
"""Relative rounding of the log-probabilities that float16 rounds by more."""
_LOWEST = np.float32(-65_504)
"""Least number of float16: below it candidates are -inf on the wire."""
_NEAR_UNIFORM_NATS = 0.7
"""Nats by which a row may exceed 1/V and count as uniform: a padded lm_head makes V known to a factor of two only."""


def implausible(block: Block, *, vocabulary_size: int, k: int, rounded_nats: float = 0.0) -> str | None:
    """Return why a source's block cannot be a working model's answer; None when it can.

    Beside what `implausible_scores` refuses: other k than asked for, ids beyond the vocabulary, candidates out of order
    or twice in a row, and a realised token that contradicts them.

    Args:
        block: as decoded, in the source's own vocabulary.
        vocabulary_size: number of ids in that vocabulary.
        k: number of candidates that was asked for.
        rounded_nats: by how much the candidates' log-probabilities may be rounded, beyond float16 on the wire.
    """
    if block.k != k:
        return f"the rows have {block.k} candidates instead of {k}"
    if block.context_ids_C.size or block.first_id is not None:
        return "there are tokens before the rows, which only the target's blocks have"
    if block.num_tokens == 0:
        return None
    largest = max(int(block.topk_ids_TK.max()), int(block.token_ids_T.max()))
    if largest >= vocabulary_size:
        return f"token id {largest} is beyond the vocabulary of {vocabulary_size}"
    return (
        implausible_scores(block.gold_T, block.topk_logprobs_TK, vocabulary_size=vocabulary_size)
        or _disorder(block.topk_ids_TK, block.topk_logprobs_TK)
        or _contradiction(block.token_ids_T, block.gold_T, block.topk_ids_TK, block.topk_logprobs_TK, rounded_nats)
    )


def implausible_scores(gold_T: Float32, topk_logprobs_TK: Float32, *, vocabulary_size: int) -> str | None:
    """Return why no working model answers with these log-probabilities; None when one may.

    It refuses NaN and infinities, rows with more than all mass, and rows that give every token the same probability.
    """
    mass_T = np.exp(topk_logprobs_TK).sum(axis=1)  # NaN where there is one, and NaN fails every comparison
    if not (mass_T > 0).all() or not (gold_T > -np.inf).all() or not math.isfinite(most := float(mass_T.max())):
        return "the model answers with NaN or infinite log-probabilities"
    if most > 1 + _EXCESS_MASS or gold_T.max() > _EXCESS_MASS:
        return f"the model's probabilities sum to {most:.3f}, more than one"
    if topk_logprobs_TK.max() < -math.log(vocabulary_size) + _NEAR_UNIFORM_NATS:
        spread_T = topk_logprobs_TK.max(axis=1) - np.minimum(topk_logprobs_TK.min(axis=1), gold_T)
        if spread_T.max() < _SAME_NATS:
            return "the model gives every token the same probability, 1/V: its weights are lost"
    return None


def _disorder(ids_TK: Int32, logprobs_TK: Float32) -> str | None:
    """Return the problem with the candidates' order, None for none. Padding may stand anywhere, and has no mass."""
    ordered = bool((logprobs_TK[:, 1:] <= logprobs_TK[:, :-1]).all())
    sorted_TK = np.sort(ids_TK, axis=1)
    twice = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    if sorted_TK[:, 0].min() == PADDING_ID:
        padded_TK = ids_TK == PADDING_ID
        if (logprobs_TK[padded_TK] > -np.inf).any():
            return "padding among the candidates has probability"
        twice &= sorted_TK[:, 1:] != PADDING_ID
        lowest_TK = np.minimum.accumulate(np.where(padded_TK, np.float32(np.inf), logprobs_TK), axis=1)
        ordered = bool((padded_TK | (logprobs_TK <= lowest_TK)).all())
    if not ordered:
        return "the candidates are not in order of falling probability"
    return "a row has the same candidate twice" if twice.any() else None


def _contradiction(
    token_ids_T: Int32, gold_T: Float32, ids_TK: Int32, logprobs_TK: Float32, rounded_nats: float
) -> str | None:
    """Return a message when a realised token's log-probability contradicts the candidates'; else None.

    It does when it differs from the token's own among the candidates, or exceeds theirs without being one.
    """
    last_T = logprobs_TK[:, -1]
    if not np.isfinite(last_T).all():
        last_T = logprobs_TK.min(axis=1, where=logprobs_TK > -np.inf, initial=np.inf)
    hits_TK = ids_TK == token_ids_T[:, None]
    place_T = hits_TK.argmax(axis=1)
    each = np.arange(len(token_ids_T))
    is_candidate_T = hits_TK[each, place_T]
    there_T = np.maximum(np.where(is_candidate_T, logprobs_TK[each, place_T], last_T), _LOWEST)
    gold_T = np.maximum(gold_T, _LOWEST)
    slack_T = _SAME_NATS + rounded_nats - _HALF_PRECISION * gold_T
    sound_T = (gold_T <= there_T + slack_T) & (~is_candidate_T | (there_T <= gold_T + slack_T))
    return None if sound_T.all() else "the realised tokens' log-probabilities contradict the candidates'"
