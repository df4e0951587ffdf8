"""Labels of relevance without annotations (CogLTX, Ding et al. 2020, section 3.3).

A block is relevant when the answer's loss rises without it. Every block has a level, an integer; BM25 gives the first
ones, and every intervention moves the levels of the blocks that were taken away, one step up or down. Blocks of level 1
and above are relevant. In contrast to the paper the differences of a document lose their median first: most blocks say
nothing about the answer, yet the loss falls without them, because the text is shorter.

Shapes: B blocks of a document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Loss = Callable[[Sequence[Sequence[int]]], NDArray[np.floating]]
"""A function of texts, each a list of blocks, that returns the loss of the answer after each, in nats."""


class LabelConfig(BaseModel):
    """Settings of the labels.

    Attributes:
        up: a block rises a level where the loss without it is higher by that much, in nats.
        down: a block falls a level where the difference is at most that, in nats.
        lowest, highest: levels at which blocks stay.
        start: blocks of a document that BM25 puts on level 1 at the start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    up: float = Field(default=0.2, gt=0)
    down: float = Field(default=-0.05, le=0)
    lowest: int = Field(default=-1, le=0)
    highest: int = Field(default=2, ge=1)
    start: int = Field(default=2, ge=0)


def start_levels(question: str, blocks: Sequence[str], config: LabelConfig) -> NDArray[np.int8]:
    """Return the first levels: 1 for the `start` best blocks that share a word with the question, 0 for the others."""
    score_B = bm25(question, blocks)
    levels_B = np.zeros(len(blocks), dtype=np.int8)
    best = np.argsort(-score_B, kind="stable")[: config.start]
    levels_B[best[score_B[best] > 0]] = 1
    return levels_B


def relevant(levels_B: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Return which blocks are relevant."""
    return levels_B >= 1


def differences(loss: Loss, held: Sequence[int]) -> NDArray[np.float64]:
    """Return by how much the loss is higher without each of the blocks held, in nats, their median subtracted.

    With less than three blocks no median says what an irrelevant block does: nothing is subtracted.
    """
    texts = [list(held), *([other for other in held if other != block] for block in held)]
    losses = np.asarray(loss(texts), dtype=np.float64)
    differences_H: NDArray[np.float64] = losses[1:] - losses[0]
    if len(held) > 2:
        differences_H -= np.median(differences_H)
    return differences_H


def moved(
    levels_B: NDArray[np.int8],
    held: Sequence[int],
    differences_H: NDArray[np.floating],
    config: LabelConfig,
) -> NDArray[np.int8]:
    """Return the levels after an intervention on the blocks `held`; see `differences`. NaN moves nothing."""
    steps_H = (differences_H >= config.up).astype(np.int8) - (differences_H <= config.down).astype(np.int8)
    after_B = levels_B.copy()
    after_B[list(held)] = np.clip(levels_B[list(held)] + steps_H, config.lowest, config.highest)
    return after_B


def bm25(question: str, blocks: Sequence[str]) -> NDArray[np.float32]:
    """Return the score of every block: BM25 by Lucene's formula, k1 1.5, b 0.75, over lower-case words.

    Raises ValueError when bm25s is not installed.
    """
    if find_spec("bm25s") is None:
        raise ValueError("bm25s is not installed; the extra `recall` has it (llm-fusion[recall])")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds
    words_B = bm25s.tokenize(list(blocks), stopwords=None, show_progress=False, return_ids=False)
    wanted = bm25s.tokenize([question], stopwords=None, show_progress=False, return_ids=False)[0]
    known = {word for words in words_B for word in words}
    wanted = [word for word in wanted if word in known]
    if not wanted:
        return np.zeros(len(blocks), dtype=np.float32)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(words_B, show_progress=False)
    return np.asarray(index.get_scores(wanted), dtype=np.float32)
