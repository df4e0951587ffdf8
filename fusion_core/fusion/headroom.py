"""The best fixed mixture of sources on text that they have scored, found without any alignment.

Where tokens of all sources end at the same byte, the product of a source's probabilities up to there is its probability
of these bytes. Between two such places every source has a probability of the same bytes, and a mixture of sources with
weights w gives them the probability sum_s w_s p_s. The weights that make the text likeliest are found by
expectation maximisation (Dempster et al. 1977); the problem is concave, and the largest mean ratio of a source's
probability to the mixture's bounds the distance to its maximum.

Shape legend: S sources, N segments (the bytes between two neighbouring common ends).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Float64, Int64
from fusion_core.blocks import Block

_CLOSE_ENOUGH = 1e-7
"""Nats per segment that the weights found may lose on the best ones."""
_MOST_STEPS = 5000


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The bytes between neighbouring places at which tokens of all sources end.

    Attributes:
        logprobs_SN: float64 nats, each source's log-probability of a segment's bytes.
        bytes_N: int64, at least one each.
    """

    logprobs_SN: Float64
    bytes_N: Int64

    @classmethod
    def joined(cls, parts: Sequence[Segments]) -> Segments:
        """Return the segments of several texts together."""
        return cls(
            np.concatenate([part.logprobs_SN for part in parts], axis=1),
            np.concatenate([part.bytes_N for part in parts]),
        )

    def of(self, sources: Sequence[int]) -> Segments:
        """Return the same segments for some of the sources, by their places."""
        return Segments(self.logprobs_SN[list(sources)], self.bytes_N)


@dataclass(frozen=True, slots=True, eq=False)
class BestMixture:
    """The likeliest fixed mixture: its weights, which sum to one, and its loss in nats per byte."""

    weight_S: Float64
    nats_per_byte: float


def common_segments(blocks: Sequence[Block]) -> Segments:
    """Return the segments of a text that every source has scored; end rows do not count.

    Raises ValueError when the blocks are of different texts, or one has a masked row: its source has not said how
    likely the text is.
    """
    text = blocks[0].text_bytes
    ends = np.array([len(text)], dtype=np.int64) if text else np.empty(0, dtype=np.int64)
    for number, block in enumerate(blocks):
        if block.text_bytes != text:
            raise ValueError(f"blocks: number {number} is of another text than the first")
        if not block.mask_T[: block.num_text_tokens].all():
            raise ValueError(f"blocks: number {number} has masked rows")
    for number, block in enumerate(blocks):
        own = np.unique(block.byte_ends_T[: block.num_text_tokens]).astype(np.int64)
        ends = own[own > 0] if number == 0 else np.intersect1d(ends, own, assume_unique=True)
    logprobs_SN = np.stack([_between(block, ends) for block in blocks])
    return Segments(logprobs_SN, np.diff(ends, prepend=0))


def best_mixture(segments: Segments) -> BestMixture:
    """Return the fixed weights under which the segments are likeliest."""
    num_sources, num_segments = segments.logprobs_SN.shape
    weight_S = np.full(num_sources, 1.0 / num_sources)
    if not num_segments:
        return BestMixture(weight_S, float("nan"))
    ratio_SN = np.exp(segments.logprobs_SN - segments.logprobs_SN.max(axis=0))
    for _ in range(_MOST_STEPS):
        gain_S = (ratio_SN / (weight_S @ ratio_SN)).mean(axis=1)
        weight_S = weight_S * gain_S
        if np.log(gain_S.max()) < _CLOSE_ENOUGH:
            break
    weight_S /= weight_S.sum()
    return BestMixture(weight_S, mixture_nats_per_byte(segments, weight_S))


def segment_nats(segments: Segments, weight_S: Float64) -> Float64:
    """Return the nats that a mixture of these weights loses on each segment."""
    with np.errstate(divide="ignore"):
        log_weight_S1 = np.log(weight_S)[:, None]
    nats_N: Float64 = -np.logaddexp.reduce(segments.logprobs_SN + log_weight_S1, axis=0)
    return nats_N


def mixture_nats_per_byte(segments: Segments, weight_S: Float64) -> float:
    """Return the loss of a mixture of these weights in nats per byte."""
    return float(segment_nats(segments, weight_S).sum() / segments.bytes_N.sum())


def _between(block: Block, ends: Int64) -> Float64:
    """Return a source's log-probability of the bytes up to each of the ends since the one before it."""
    sums = np.concatenate([[0.0], np.cumsum(block.gold_T[: block.num_text_tokens], dtype=np.float64)])
    until = sums[np.searchsorted(block.byte_ends_T[: block.num_text_tokens], ends, side="right")]
    between: Float64 = np.diff(until, prepend=0.0)
    return between
