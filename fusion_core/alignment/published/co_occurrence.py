"""Choice between equally near pieces by the cosine of their co-occurrence counts.

FuseLLM's reference breaks ties of its vocabulary map this way (`vocab_mapping.py`, option `co_occurrence`). Two tokens
co-occur when they stand at most `window` tokens apart in one document. To compare counts of two vocabularies, the
contexts are the pieces that both vocabularies have: only there does a context mean the same on both sides.

Shape legend: N non-zero counts, V ids, C tied candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Float64, Int32, Int64
from fusion_core.compiled import compiled

_DISTINCT = 1e-12
"""Relative difference below which cosines are equal: rounding must not decide exact ties."""


@dataclass(frozen=True, slots=True, eq=False)
class CoOccurrence:
    """Sparse counts: token v met `contexts_N[i]` `counts_N[i]` times, for i from starts_V1[v] to starts_V1[v + 1]."""

    starts_V1: Int64
    contexts_N: Int64
    counts_N: Float64

    @classmethod
    def count(cls, documents: Iterable[Int32], context_V: Int32, window: int) -> CoOccurrence:
        """Count pairs of tokens at most `window` apart, in both directions.

        Args:
            documents: token ids of each document.
            context_V: int32, the context that each id counts as; -1 for none.
            window: in tokens.
        """
        size = context_V.shape[0]
        keys: list[Int64] = []
        for ids in documents:
            wide = ids.astype(np.int64)
            for gap in range(1, min(window, len(ids) - 1) + 1):
                for token, neighbour in ((wide[gap:], wide[:-gap]), (wide[:-gap], wide[gap:])):
                    context = context_V[neighbour]
                    keys.append((token * size + neighbour)[context >= 0])
        pairs, counts = np.unique(np.concatenate(keys) if keys else np.zeros(0, np.int64), return_counts=True)
        starts_V1 = np.searchsorted(pairs // size, np.arange(size + 1)).astype(np.int64)
        return cls(starts_V1, context_V[pairs % size].astype(np.int64), counts.astype(np.float64))

    def has(self, token: int) -> bool:
        return bool(self.starts_V1[token + 1] > self.starts_V1[token])


def most_similar(source: CoOccurrence, token: int, target: CoOccurrence, candidates_C: Sequence[int] | Int64) -> int:
    """Return the place in `candidates_C` with the highest cosine to the token: first of equals, 0 without counts."""
    return int(
        _most_similar(
            source.contexts_N[source.starts_V1[token] : source.starts_V1[token + 1]],
            source.counts_N[source.starts_V1[token] : source.starts_V1[token + 1]],
            np.asarray(candidates_C, np.int64),
            (target.starts_V1, target.contexts_N, target.counts_N),
            np.zeros(target.starts_V1.shape[0] - 1, np.float64),
        )
    )


@compiled
def _most_similar(
    contexts: Int64, counts: Float64, candidates_C: Int64, target: tuple[Int64, Int64, Float64], dense_V: Float64
) -> int:
    starts_V1, contexts_N, counts_N = target
    for i in range(contexts.shape[0]):
        dense_V[contexts[i]] += counts[i]
    best, best_cosine = 0, 0.0
    for place in range(candidates_C.shape[0]):
        product, square = 0.0, 0.0
        for i in range(starts_V1[candidates_C[place]], starts_V1[candidates_C[place] + 1]):
            product += counts_N[i] * dense_V[contexts_N[i]]
            square += counts_N[i] * counts_N[i]
        # The source token's own norm is the same for all candidates.
        cosine = product / np.sqrt(square) if square > 0 else 0.0
        if cosine > best_cosine * (1 + _DISTINCT):
            best, best_cosine = place, cosine
    return best
