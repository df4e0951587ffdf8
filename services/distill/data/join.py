"""Blocks that continue each other, such as the turns of a conversation, read together instead of one by one.

A block's rows are predicted from its context and its own tokens but the last. Where the context of a block begins with
all that is read for another one, a single causal pass over the longer input has the rows of both: every row sees the
same tokens at the same positions as alone, so that losses and gradients are the same. The last token of a turn, its
end, is predicted and not read: a template may write another one there in the history.

Shape legend: C tokens of a block's context, T rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Int32
from fusion_core.blocks import Block


@dataclass(frozen=True, slots=True)
class Reading:
    """Blocks that the target reads in one pass: the context of each begins with what is read for the one before, and
    its rows come behind that one's.

    The input of the last block is thus the input of all, and the rows of a block stand at positions C to C + T - 1.
    """

    blocks: tuple[Block, ...]

    @property
    def num_inputs(self) -> int:
        """The number of tokens read: the first one (BOS), and then all tokens but the last."""
        return self.blocks[-1].num_inputs

    @property
    def first_id(self) -> int | None:
        """The token in front of all others; None for BOS."""
        return self.blocks[-1].first_id

    @property
    def token_ids(self) -> Int32:
        """The tokens behind the first one, the last one included, int32 [num_inputs]."""
        return _token_ids(self.blocks[-1])


def join(blocks: Sequence[Block]) -> list[Reading]:
    """Return every block in one reading, joined to the block that it continues where that one is among them.

    Of several blocks that continue the same one, such as answers to one question, one is joined to it. Readings come in
    the order of the first of their blocks.
    """
    read = [_spelled(block) for block in blocks]  # in byte order a prefix comes first
    readings: list[list[int]] = []
    for index in sorted(range(len(blocks)), key=lambda index: (read[index], blocks[index].context_ids_C.size)):
        num_context, last = blocks[index].context_ids_C.size, readings[-1][-1] if readings else None
        behind = last is not None and num_context >= blocks[last].num_inputs
        if last is not None and behind and read[index][: 4 + 4 * num_context].startswith(read[last]):
            readings[-1].append(index)
        else:
            readings.append([index])
    return [Reading(tuple(blocks[index] for index in reading)) for reading in sorted(readings, key=min)]


def _spelled(block: Block) -> bytes:
    """Return the tokens that are read for a block, four bytes each: the first one, and those behind it but the last.

    Where that is the first one alone, which all blocks share, the token that is predicted stands behind it.
    """
    first_id = np.int32(-1 if block.first_id is None else block.first_id)
    token_ids = _token_ids(block)
    return np.append(first_id, token_ids[: max(1, token_ids.size - 1)]).astype(">i4").tobytes()


def _token_ids(block: Block) -> Int32:
    if not block.context_ids_C.size:
        return block.token_ids_T
    return np.concatenate([block.context_ids_C, block.token_ids_T])
