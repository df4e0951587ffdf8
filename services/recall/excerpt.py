"""Text that models read in the place of a long one: its key blocks, and the question behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

GAP = b"\n...\n"
"""What stands between two blocks that are not neighbours."""


class _Block(Protocol):
    @property
    def start_byte(self) -> int: ...

    @property
    def end_byte(self) -> int: ...


def excerpt_of(text: bytes, blocks: Iterable[_Block]) -> bytes:
    """Return the blocks of a text, in its order, as one text; neighbours are joined as they were."""
    pieces: list[bytes] = []
    end = None
    for block in blocks:
        if end is not None and block.start_byte != end:
            pieces.append(GAP)
        pieces.append(text[block.start_byte : block.end_byte])
        end = block.end_byte
    return b"".join(pieces)


def prompt_of(excerpt: bytes, question: str) -> str:
    """Return what a model is asked: the excerpt, an empty line, the question."""
    return f"{excerpt.decode(errors='replace').rstrip()}\n\n{question}"
