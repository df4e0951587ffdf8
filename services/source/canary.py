"""Texts that show whether a model still computes what it did: a served model can break without an error.

Every block is checked before it is sent (services/wire/plausible.py). The canary is a few built-in texts, scored at
start, at an interval and whenever a text has no plausible answer, and compared with the record of the first run on the
same weights, engine and dtype. The record is a file in `$FUSION_HOME/canaries`, so that it outlives the replica; where
nothing can be written, the first run since the start is the record.

Shape legend: T tokens of all canary texts.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from fusion_core.arrays import Float32
from services.base.atomic import whole_file
from services.base.home import fusion_home

logger = logging.getLogger("ray.serve")

TEXTS = (
    b"The capital of France is Paris, and the river that flows through it is called the Seine.",
    b"def add(first: int, second: int) -> int:\n    return first + second\n",
    b"In 1969 landeten zwei Menschen auf dem Mond; 12 sind es insgesamt gewesen.",
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
