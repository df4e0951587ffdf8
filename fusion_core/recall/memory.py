"""MemRecall: find the few blocks of a long text that an answer needs (CogLTX, Ding et al. 2020, algorithm 1).

A judge reads windows: the question, what memory holds, and some of the other blocks. In every hop

1. the blocks that memory does not hold compete, packed into as few windows as their order allows;
2. the best of them enter memory until one window is full;
3. in rehearsal the judge reads that window, and its scores replace those of the competition, which were given in
   windows that do not compare;
4. memory decays to the stride of the hop: its best blocks stay, the others leave.

What memory holds is part of the question in the next hop: a fact that names an entity brings up the block about it.
After the last hop the budget is filled with the best of the others. Blocks are known by their index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Scorer = Callable[[Sequence[Sequence[int]]], Sequence[NDArray[np.floating]]]
"""A function of windows, each a list of blocks behind the question, that returns a score for every block of each."""


class MemoryConfig(BaseModel):
    """Settings of MemRecall.

    Attributes:
        window_tokens: tokens that the judge reads at once, the question's included.
        hops: blocks that memory keeps after each hop.
        rehearsal: score memory anew in one window before it decays; without, the scores of the competitions count.
        budget_tokens: tokens of all blocks that are returned, the question's not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_tokens: int = Field(default=512, ge=16)
    hops: tuple[int, ...] = Field(default=(3, 5), min_length=1)
    rehearsal: bool = True
    budget_tokens: int = Field(default=448, ge=1)


@dataclass(frozen=True, slots=True)
class Recalled:
    """A block that was found.

    Attributes:
        block: index.
        score: the judge's last one.
        hop: the hop, from 1, since which memory has held the block; 0 for a block that only fills the budget.
    """

    block: int
    score: float
    hop: int


def recall(question_tokens: int, block_tokens: Sequence[int], scorer: Scorer, config: MemoryConfig) -> list[Recalled]:
    """Return the blocks that the judge holds for relevant, in the order of the text; ties go to the earlier block.

    Args:
        question_tokens: tokens of the question in a window, separators included.
        block_tokens: the same of every block of the text.
        scorer: the judge, who knows the question and the blocks.
        config: settings.

    Raises ValueError when the window does not hold the question and the longest block, or a hop keeps no block.
    """
    room = config.window_tokens - question_tokens
    if min(config.hops) < 1:
        raise ValueError(f"hops: must be numbers of at least 1, got {','.join(map(str, config.hops))}")
    if block_tokens and room < max(block_tokens):
        raise ValueError(
            f"question: its {question_tokens} tokens and a block of {max(block_tokens)} do not fit the judge's window "
            f"of {config.window_tokens}"
        )
    score_B = np.full(len(block_tokens), -np.inf)
    hop_B = np.zeros(len(block_tokens), dtype=np.int64)
    memory: list[int] = []
    for hop, stride in enumerate(config.hops, start=1):
        memory = _compete(memory, block_tokens, room, scorer, score_B)
        if config.rehearsal and memory:
            score_B[memory] = scorer([memory])[0]
        memory = sorted(_best(memory, score_B)[:stride])
        held = np.isin(np.arange(len(block_tokens)), memory)
        hop_B = np.where(held, np.where(hop_B > 0, hop_B, hop), 0)
    best = _best(memory, score_B)
    others = _best(np.flatnonzero(hop_B == 0).tolist(), score_B)
    chosen = _fitting([*best, *others], block_tokens, config.budget_tokens)
    return [Recalled(block, float(score_B[block]), int(hop_B[block])) for block in sorted(chosen)]


def windows(memory: Sequence[int], blocks: Iterable[int], block_tokens: Sequence[int], room: int) -> list[list[int]]:
    """Return the windows of a competition: memory's blocks, and behind them as many others as fit, in their order.

    `room`: tokens of a window without the question's. Every block must fit beside memory.
    """
    held = sum(block_tokens[block] for block in memory)
    packed: list[list[int]] = []
    used = room + 1
    for block in blocks:
        if used + block_tokens[block] > room:
            packed.append(list(memory))
            used = held
        packed[-1].append(block)
        used += block_tokens[block]
    return packed


def _compete(
    memory: list[int], block_tokens: Sequence[int], room: int, scorer: Scorer, score_B: NDArray[np.float64]
) -> list[int]:
    """Score all blocks outside memory, in place; return memory with the best of them, as far as a window holds them.

    The weakest leave memory first where it is so full that the longest other block would not fit beside it.
    """
    ranked = _best(memory, score_B)
    while ranked:
        others = [block for block in range(len(block_tokens)) if block not in ranked]
        longest = max((block_tokens[block] for block in others), default=0)
        if sum(block_tokens[block] for block in ranked) + longest <= room:
            break
        ranked.pop()
    kept = sorted(ranked)
    others = np.setdiff1d(np.arange(len(block_tokens)), kept).tolist()
    packed = windows(kept, others, block_tokens, room)
    for window, scores in zip(packed, scorer(packed) if packed else [], strict=True):
        score_B[window[len(kept) :]] = scores[len(kept) :]
    left = room - sum(block_tokens[block] for block in kept)
    return sorted([*kept, *_fitting(_best(others, score_B), block_tokens, left)])


def _best(blocks: Sequence[int], score_B: NDArray[np.float64]) -> list[int]:
    """Return the blocks, the highest score first, equal ones in the order of the text."""
    ordered = sorted(blocks)
    return [ordered[rank] for rank in np.argsort(-score_B[ordered], kind="stable")] if ordered else []


def _fitting(blocks: Iterable[int], block_tokens: Sequence[int], tokens: int) -> list[int]:
    """Return the blocks that fit, taken in their order; one that is too long for the tokens left is passed over."""
    taken: list[int] = []
    for block in blocks:
        if block_tokens[block] <= tokens:
            taken.append(block)
            tokens -= block_tokens[block]
    return taken
