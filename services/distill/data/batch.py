"""Windows of the stream as tensors for one forward pass: one reading on each row, or several packed on one.

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
from services.distill.data.join import Reading, join


@dataclass(frozen=True, slots=True)
class Batch:
    """Readings (see `join`), each behind its own BOS with positions of its own; none sees another.

    Where a row holds several of them, transformers takes every position 0 as the start of another one and lets nothing
    attend across (`DistillModule.check_packing` makes sure of it).

    Attributes:
        inputs_BL: int64, per reading BOS (or its own first token), then context and tokens but the last; rows are
            right-padded.
        positions_BL: int64, counted from 0 in every reading.
        valid_BL: bool, True where position l predicts a token of a window, not of a context; row by row these are
            the N rows.
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


def pack(blocks: Sequence[Block], row_tokens: int | None) -> list[list[Reading]]:
    """Return blocks in rows, those that continue each other joined to one reading.

    Rows have at most `row_tokens` input tokens: first fit, the longest first; a longer reading has its own row. Without
    `row_tokens` every reading has a row of its own, in the given order.
    """
    readings = join(blocks)
    if row_tokens is None:
        return [[reading] for reading in readings]
    rows: list[list[Reading]] = []
    room: list[int] = []  # tokens that still fit
    for reading in sorted(readings, key=lambda reading: -reading.num_inputs):
        row = next((row for row, left in enumerate(room) if left >= reading.num_inputs), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(reading)
        room[row] -= reading.num_inputs
    return rows


def blocks_of(rows: Sequence[Sequence[Reading]]) -> list[Block]:
    """Return the blocks of rows in the order of a batch's N tokens."""
    return [block for row in rows for reading in row for block in reading.blocks]


def collate(rows: Sequence[Sequence[Reading]], bos: int, *, vocabulary_size: int, tokens_only: bool = False) -> Batch:
    """Return the batch of rows of readings (see `pack`); no rows make one position that predicts nothing.

    Raises ValueError when a block holds an id that the vocabulary does not have.
    """
    blocks = blocks_of(rows)
    num_rows = max(1, len(rows))
    length = max([1, *(sum(reading.num_inputs for reading in row) for row in rows)])
    inputs_BL = np.full((num_rows, length), bos, dtype=np.int64)
    valid_BL = np.zeros((num_rows, length), dtype=np.bool_)
    # Positions of a reading alone on its row go on through the padding: one run of positions needs no attention mask.
    # Behind packed ones every padded position is 0, a reading of its own.
    packed = any(len(row) > 1 for row in rows)
    positions_BL = np.zeros((num_rows, length), dtype=np.int64) if packed else np.tile(np.arange(length), (num_rows, 1))
    for number, row in enumerate(rows):
        start = 0
        for reading in row:
            stop = start + reading.num_inputs
            inputs_BL[number, start] = bos if reading.first_id is None else reading.first_id
            inputs_BL[number, start + 1 : stop] = reading.token_ids[:-1]
            for block in reading.blocks:
                first = start + block.context_ids_C.size
                valid_BL[number, first : first + block.num_tokens] = True
            if packed:
                positions_BL[number, start:stop] = np.arange(reading.num_inputs)
            start = stop
    tokens_N = np.concatenate([np.empty(0, dtype=np.int64), *(block.token_ids_T for block in blocks)])
    _check_ids(tokens_N, "token_ids", vocabulary_size)
    _check_ids(inputs_BL, "context_ids", vocabulary_size)
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
