"""A source's distributions written in the target's vocabulary, one row per target token.

Shape legend: T target tokens, M entries per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion_core.arrays import Bool, Float32, Int32

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedRows:
    """Sparse next-token distributions over the target's vocabulary; row t predicts target token t.

    Attributes:
        ids_TM: int32 target ids, each at most once per row, -1 where padded; in no particular order.
        probs_TM: float32 probabilities (not logs), 0 where padded.
        tail_T: float32 probability outside the entries; a row's entries and its tail sum to one.
        gold_T: float32 nats, log-probability of the realised target token; in unmasked rows also an entry.
        mask_T: bool, False where no distribution could be given: no entries, all mass in the tail. `gold_T` of such a
            row is only the share of the source's loss that keeps the sum over the window equal to the source's own.
        covered_T: float32, the mass that the mapping moved onto target tokens, before the realised token's exact
            probability was put in.
    """

    ids_TM: Int32
    probs_TM: Float32
    tail_T: Float32
    gold_T: Float32
    mask_T: Bool
    covered_T: Float32

    @property
    def num_tokens(self) -> int:
        return int(self.ids_TM.shape[0])

    @classmethod
    def masked(cls) -> ProjectedRows:
        """Return one row without a distribution."""
        zero = np.zeros(1, dtype=np.float32)
        return cls(
            ids_TM=np.full((1, 1), -1, dtype=np.int32),
            probs_TM=np.zeros((1, 1), dtype=np.float32),
            tail_T=np.ones(1, dtype=np.float32),
            gold_T=zero,
            mask_T=np.zeros(1, dtype=np.bool_),
            covered_T=zero,
        )

    def followed_by(self, below: ProjectedRows) -> ProjectedRows:
        """Return these rows and then those of `below`, as wide as the wider ones."""
        width = max(self.ids_TM.shape[1], below.ids_TM.shape[1])
        parts = (self, below)
        return ProjectedRows(
            ids_TM=np.concatenate([_padded(rows.ids_TM, width, -1) for rows in parts]),
            probs_TM=np.concatenate([_padded(rows.probs_TM, width, 0) for rows in parts]),
            tail_T=np.concatenate([rows.tail_T for rows in parts]),
            gold_T=np.concatenate([rows.gold_T for rows in parts]),
            mask_T=np.concatenate([rows.mask_T for rows in parts]),
            covered_T=np.concatenate([rows.covered_T for rows in parts]),
        )

    @property
    def masked_share(self) -> float:
        return 1.0 - float(self.mask_T.mean()) if self.num_tokens else 0.0

    @property
    def covered_mass(self) -> float:
        """The mean of `covered_T` over the rows that are not masked; NaN when there is none."""
        return float(self.covered_T[self.mask_T].mean()) if self.mask_T.any() else float("nan")


def _padded(entries_TM: npt.NDArray[Scalar], width: int, value: int) -> npt.NDArray[Scalar]:
    missing = width - entries_TM.shape[1]
    return np.pad(entries_TM, ((0, 0), (0, missing)), constant_values=value) if missing else entries_TM
