"""The fused next-token distributions of a batch as tensors.

Shape legend: N rows (tokens of all windows of a batch), K candidates per row, V ids in the vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseRows:
    """N distributions, each on its own support of at most K ids plus one bucket for all the rest.

    Attributes:
        ids_NK: int64, -1 where padded; the ids of a row differ from each other.
        logprobs_NK: float32 nats, -inf where padded.
        tail_N: float32, log of the mass outside the support (-inf when there is none).
        mask_N: bool, False where the row is not trained on; such rows may hold anything.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor
    mask_N: Tensor

    def __post_init__(self) -> None:
        num_rows = self.ids_NK.shape[0]
        if self.ids_NK.shape != self.logprobs_NK.shape:
            raise ValueError(
                f"logprobs: expected shape {tuple(self.ids_NK.shape)}, got {tuple(self.logprobs_NK.shape)}"
            )
        for name, column in (("tail", self.tail_N), ("mask", self.mask_N)):
            if column.shape != (num_rows,):
                raise ValueError(f"{name}: expected shape {(num_rows,)}, got {tuple(column.shape)}")

    def slice(self, start: int, stop: int) -> SparseRows:
        return SparseRows(
            self.ids_NK[start:stop], self.logprobs_NK[start:stop], self.tail_N[start:stop], self.mask_N[start:stop]
        )
