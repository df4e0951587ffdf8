"""Windows of the stream as tensors for one forward pass: each on a row of its own, or several packed on one.

Shape legend: B rows, L positions (of the longest row), N tokens of all windows, K candidates per token.
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
    """Windows, each behind its own BOS with positions of its own; no window sees another.

    Where a row holds several windows, transformers takes every position 0 as the start of another window and lets
    nothing attend across (`DistillModule.check_packing` makes sure of it).

    Attributes:
        inputs_BL: int64, per window BOS and then all tokens but the last; rows are right-padded.
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
        """The number of tokens predicted, N."""
        return int(self.token_ids_N.shape[0])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
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


def pack(blocks: Sequence[Block], row_tokens: int | None) -> list[list[Block]]:
    """Return blocks in rows of at most `row_tokens` tokens: first fit, the longest first; a longer one has its own row.

    Without `row_tokens` every block has a row of its own, in the given order.
    """
    if row_tokens is None:
        return [[block] for block in blocks]
    rows: list[list[Block]] = []
    room: list[int] = []  # tokens that still fit
    for block in sorted(blocks, key=lambda block: -block.num_tokens):
        row = next((row for row, left in enumerate(room) if left >= block.num_tokens), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(block)
        room[row] -= block.num_tokens
    return rows


def collate(rows: Sequence[Sequence[Block]], bos: int, *, vocabulary_size: int, tokens_only: bool = False) -> Batch:
    """Return the batch of rows of blocks (see `pack`); no rows make one position that predicts nothing.

    Raises ValueError when a block holds an id that the vocabulary does not have.
    """
    blocks = [block for row in rows for block in row]
    num_rows = max(1, len(rows))
    length = max([1, *(sum(block.num_tokens for block in row) for row in rows)])
    inputs_BL = np.full((num_rows, length), bos, dtype=np.int64)
    valid_BL = np.zeros((num_rows, length), dtype=np.bool_)
    # Positions of a window alone on its row go on through the padding: one run of positions needs no attention mask.
    # Behind packed windows every padded position is 0, a window of its own.
    packed = any(len(row) > 1 for row in rows)
    positions_BL = np.zeros((num_rows, length), dtype=np.int64) if packed else np.tile(np.arange(length), (num_rows, 1))
    for number, row in enumerate(rows):
        start = 0
        for block in row:
            stop = start + block.num_tokens
            inputs_BL[number, start + 1 : stop] = block.token_ids_T[:-1]
            valid_BL[number, start:stop] = True
            if packed:
                positions_BL[number, start:stop] = np.arange(block.num_tokens)
            start = stop
    tokens_N = np.concatenate([np.empty(0, dtype=np.int64), *(block.token_ids_T for block in blocks)])
    _check_ids(tokens_N, "token_ids", vocabulary_size)
    return Batch(
        inputs_BL=torch.from_numpy(inputs_BL),
        positions_BL=torch.from_numpy(positions_BL),
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
