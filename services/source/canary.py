"""Texts that show whether a model still computes what it did: a served model can break without an error.

Every block is checked before it is sent (services/wire/plausible.py). The canary is a few built-in texts, scored at
start, at an interval and whenever a text has no plausible answer, and compared with the record of the first run on the
same weights, engine and dtype. The record is a file in `$FUSION_HOME/canaries`, so that it outlives the replica; where
nothing can be written, the first run since the start is the record.

Where an engine batches texts, the numbers of a text depend on its company by rounding, and with experts also by a
router's choice between two that are almost equal. So the texts are scored alone and together at the start; the
comparison with the record allows for the difference.

Shape legend: T tokens of all canary texts, K candidates.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Float32
from services.base.atomic import whole_file
from services.base.home import fusion_home
from services.source.engines.base import PromptScores

logger = logging.getLogger("ray.serve")

TEXTS = (
    b"The capital of France is Paris, and the river that flows through it is called the Seine.",
    b"def add(first: int, second: int) -> int:\n    return first + second\n",
    b"In 1969 landeten zwei Menschen auf dem Mond; 12 sind es insgesamt gewesen.",
)


@dataclass(frozen=True, slots=True)
class BatchEffect:
    """Difference between scores of the canary texts alone and together.

    Attributes:
        mean_nats: mean difference of the log-probability of a text's own token.
        largest_nats: largest difference of a log-probability, those of the k-th candidates included.
        same_candidates: share of the candidates that are the same, whatever their order.
    """

    mean_nats: float = 0.0
    largest_nats: float = 0.0
    same_candidates: float = 1.0

    @classmethod
    def between(cls, alone: Sequence[PromptScores], together: Sequence[PromptScores]) -> BatchEffect:
        """Compare scores of the same texts."""
        gold_T, topk_TK, same = [], [], []
        for one, other in zip(alone, together, strict=True):
            gold_T.append(np.abs(one.gold_T - other.gold_T))
            topk_TK.append(np.abs(one.topk_logprobs_TK - other.topk_logprobs_TK).ravel())
            pairs_TKK = one.topk_ids_TK[:, :, None] == other.topk_ids_TK[:, None, :]
            same.append(pairs_TKK.any(axis=2).ravel())
        gold, both = np.concatenate(gold_T), np.concatenate([*gold_T, *topk_TK])
        return cls(float(gold.mean()), float(both.max()), float(np.concatenate(same).mean()))

    def __str__(self) -> str:
        return (
            f"measured at the start: log-probabilities of the canary texts alone and together differ by at most "
            f"{self.largest_nats:.2g} nats, {self.same_candidates:.1%} of their candidates are the same"
        )


class CanaryRecord:
    """Log-probabilities of the canary texts' tokens from the first run of the same model.

    Args:
        identity: all that the numbers may depend on: weights, engine, dtype, first token.
    """

    def __init__(self, identity: tuple[str, ...]) -> None:
        name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]
        self._file = fusion_home() / "canaries" / f"{name}.npy"
        self._first: Float32 | None = None

    def drift(self, gold_T: Float32) -> float:
        """Return the mean difference from the record in nats per token; the first run becomes the record."""
        if self._first is None:
            self._first = self._read(len(gold_T))
        if self._first is None:
            self._first = gold_T
            self._write(gold_T)
        return float(np.abs(gold_T - self._first).mean())

    def _read(self, num_tokens: int) -> Float32 | None:
        try:
            first_T: Float32 = np.load(self._file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return first_T if first_T.shape == (num_tokens,) and np.isfinite(first_T).all() else None

    def _write(self, gold_T: Float32) -> None:
        try:
            with whole_file(self._file) as partial, partial.open("wb") as stream:
                np.save(stream, gold_T)
        except OSError as error:
            logger.warning("the canary's record lasts only as long as this replica: %s", error)
