"""Windows of the stream as tensors for one training step.

Shape legend: B windows, L positions (longest window), N tokens of all windows, K candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fusion_core.blocks import PADDING_ID, Block
from fusion_core.losses import SparseRows


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows side by side, each on its own row: positions start anew, and no window sees another.

    Attributes:
        inputs_BL: int64, BOS and then all tokens but the last; right-padded.
        positions_BL: int64, counted from 0 in every window.
        valid_BL: bool, True where position l predicts a token. In row-major order these are the N rows.
        token_ids_N: int64, the tokens predicted.
        rows: the fused distributions of these tokens; None when the blocks carry none.
    """

    inputs_BL: Tensor
    positions_BL: Tensor
    valid_BL: Tensor
    token_ids_N: Tensor
    rows: SparseRows | None

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_N.shape[0])

    @property
    def num_fused(self) -> int:
        """Rows that the fusion loss counts."""
        return 0 if self.rows is None else int(self.rows.mask_N.sum())

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        rows = self.rows and SparseRows(
            self.rows.ids_NK.to(device),
            self.rows.logprobs_NK.to(device),
            self.rows.tail_N.to(device),
            self.rows.mask_N.to(device),
        )
        return replace(
            self,
            inputs_BL=self.inputs_BL.to(device),
            positions_BL=self.positions_BL.to(device),
            valid_BL=self.valid_BL.to(device),
            token_ids_N=self.token_ids_N.to(device),
            rows=rows,
        )


def collate(blocks: Sequence[Block], bos: int, *, vocabulary_size: int, tokens_only: bool = False) -> Batch:
    """Makes a batch of blocks; an empty sequence gives one position that predicts nothing.

    Raises ValueError when a block holds an id that the vocabulary does not have.
    """
    num_windows = max(1, len(blocks))
    length = max([1, *(block.num_tokens for block in blocks)])
    inputs_BL = np.full((num_windows, length), bos, dtype=np.int64)
    valid_BL = np.zeros((num_windows, length), dtype=np.bool_)
    for row, block in enumerate(blocks):
        inputs_BL[row, 1 : block.num_tokens] = block.token_ids_T[:-1]
        valid_BL[row, : block.num_tokens] = True
    tokens_N = np.concatenate([np.empty(0, dtype=np.int64), *(block.token_ids_T for block in blocks)])
    _check_ids(tokens_N, "token_ids", vocabulary_size)
    return Batch(
        inputs_BL=torch.from_numpy(inputs_BL),
        positions_BL=torch.arange(length).expand(num_windows, length),
        valid_BL=torch.from_numpy(valid_BL),
        token_ids_N=torch.from_numpy(tokens_N),
        rows=None if tokens_only else _rows(blocks, vocabulary_size),
    )


def _rows(blocks: Sequence[Block], vocabulary_size: int) -> SparseRows:
    width = max([0, *(block.k for block in blocks)])
    num_tokens = sum(block.num_tokens for block in blocks)
    ids_NK = np.full((num_tokens, width), PADDING_ID, dtype=np.int64)
    logprobs_NK = np.full((num_tokens, width), -np.inf, dtype=np.float32)
    start = 0
    for block in blocks:
        ids_NK[start : start + block.num_tokens, : block.k] = block.topk_ids_TK
        logprobs_NK[start : start + block.num_tokens, : block.k] = block.topk_logprobs_TK
        start += block.num_tokens
    _check_ids(ids_NK, "topk_ids", vocabulary_size)
    return SparseRows(
        torch.from_numpy(ids_NK),
        torch.from_numpy(logprobs_NK),
        torch.from_numpy(np.concatenate([np.empty(0, dtype=np.float32), *(block.tail_T for block in blocks)])),
        torch.from_numpy(np.concatenate([np.empty(0, dtype=np.bool_), *(block.mask_T for block in blocks)])),
    )


def _check_ids(ids: np.ndarray, column: str, vocabulary_size: int) -> None:
    if ids.size and int(ids.max()) >= vocabulary_size:
        raise ValueError(f"{column}: id {int(ids.max())} in a vocabulary of {vocabulary_size} ids")
