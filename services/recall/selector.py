"""Select the key blocks of a text: the judge in a thread of its own, one text at a time.

Shapes: B blocks of a text.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

from fusion_core.recall.memory import MemoryConfig, Recalled, Scorer, recall
from services.base.errors import InvalidArgumentError
from services.recall.judge import Document

_WINDOWS_AT_ONCE = 16
"""Windows that the judge scores before it is asked whether anyone still waits for them."""


class BlockJudge(Protocol):
    """A judge of blocks; `judge.Judge` is the one that is trained."""

    window_tokens: int
    block_tokens: int

    def read(self, text: str, block_tokens: int, /) -> Document:
        """Return a text in blocks of at most so many tokens; they tile it."""

    def question(self, question: str, /) -> list[int]:
        """Return the tokens of a question as every window begins with them."""

    def scorer(self, start: list[int], document: Document, /) -> Scorer:
        """Return the function that scores windows of a document's blocks behind a question's tokens."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How blocks are selected.

    Attributes:
        budget: length of all key blocks together.
        in_tokens: whether that is in the judge's tokens; else it is in bytes of UTF-8.
        hops: blocks that the judge keeps in mind after each hop.
        rehearsal: whether the judge reads the best of a hop together once more.
    """

    budget: int
    in_tokens: bool = False
    hops: tuple[int, ...] = (3, 5)
    rehearsal: bool = True


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """A block of a text, `text[start_byte:end_byte]` of its UTF-8; the rest as in `recall.proto`."""

    start_byte: int
    end_byte: int
    score: float
    hop: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """The key blocks of a text in its order, and the number of all of its blocks."""

    blocks: tuple[KeyBlock, ...]
    num_blocks: int


class Selector:
    """The judge, asked from an event loop."""

    def __init__(self, judge: BlockJudge) -> None:
        self.judge = judge
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")

    async def select(self, text: str, question: str, selection: Selection) -> KeyBlocks:
        """Return the key blocks of a text; when the caller is cancelled, the judge stops at its next windows.

        Raises InvalidArgumentError, whose message begins with the field, for what the judge cannot read.
        """
        given_up = threading.Event()
        work = partial(select, self.judge, text, question, selection, given_up.is_set)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def close(self) -> None:
        """Wait for the text that is being read; those that wait are not begun."""
        self._thread.shutdown(cancel_futures=True)


def longest_block(judge: BlockJudge) -> int:
    """Return the most tokens of a block: those of training, but a quarter of a short window, so that some fit it."""
    return min(judge.block_tokens, judge.window_tokens // 4)


def select(
    judge: BlockJudge, text: str, question: str, selection: Selection, given_up: Callable[[], bool] = lambda: False
) -> KeyBlocks:
    """Return the key blocks of a text; see `Selector.select`. `given_up`: nobody waits any more."""
    try:
        document, start = judge.read(text, longest_block(judge)), judge.question(question)
        tokens_in_window_B = document.tokens_in_window
        memory = MemoryConfig(
            window_tokens=judge.window_tokens,
            hops=selection.hops,
            rehearsal=selection.rehearsal,
            budget_tokens=max(1, sum(tokens_in_window_B)),  # all: the budget is filled below
        )
        found = recall(len(start), tokens_in_window_B, _interruptible(judge.scorer(start, document), given_up), memory)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error
    ends_B = list(accumulate(len(block.encode()) for block in document.blocks))
    starts_B = [0, *ends_B[:-1]]
    lengths_B = [span.tokens for span in document.spans]
    costs_B = lengths_B if selection.in_tokens else [end - start for start, end in zip(starts_B, ends_B, strict=True)]
    blocks = (
        KeyBlock(starts_B[n.block], ends_B[n.block], n.score, n.hop, lengths_B[n.block])
        for n in _within(found, costs_B, selection.budget)
    )
    return KeyBlocks(tuple(blocks), len(ends_B))


def _interruptible(scorer: Scorer, given_up: Callable[[], bool]) -> Scorer:
    def score(windows: Sequence[Sequence[int]]) -> list[Any]:
        scores: list[Any] = []
        for first in range(0, len(windows), _WINDOWS_AT_ONCE):
            if given_up():
                raise InterruptedError("nobody waits for this text any more")
            scores += scorer(windows[first : first + _WINDOWS_AT_ONCE])
        return scores

    return score


def _within(found: Iterable[Recalled], costs_B: Sequence[int], budget: int) -> list[Recalled]:
    """Return the blocks that fit the budget in the order of the text: those kept in mind first, then by score."""
    taken, left = [], budget
    for block in sorted(found, key=lambda block: (block.hop == 0, -block.score, block.block)):
        if costs_B[block.block] <= left:
            taken.append(block)
            left -= costs_B[block.block]
    return sorted(taken, key=lambda block: block.block)
