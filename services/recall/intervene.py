"""Labels without spans: a served source tells by how much its loss of the answer rises when a block is taken away.

Levels start from BM25 and move in rounds; see `fusion_core.recall.labels`. What a round draws depends on its number
alone, and what it tries on the judge of the moment, so that a resumed run moves the same levels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fusion_core.recall.labels import bm25, differences, moved, relevant, start_levels
from services.recall.examples import Example
from services.recall.judge import Document, Judge
from services.recall.train import Labelled
from services.recall.training_config import InterventionConfig
from services.source.client import SourceClient
from services.wire.passage import Passage

AnswerLoss = Callable[[Sequence[Passage]], NDArray[np.float64]]
"""A function of passages, answers behind what comes before them, that returns the loss of each in nats."""

_PASSAGES_AT_ONCE = 8


class SourceLoss:
    """The loss of answers by a source over gRPC; a passage is scored once."""

    def __init__(self, address: str, application: str) -> None:
        self._address, self._application = address, application
        self._known: dict[bytes, float] = {}

    def __call__(self, passages: Sequence[Passage]) -> NDArray[np.float64]:
        """Return the losses in nats; raises ServiceError."""
        asked = {passage.identity: passage for passage in passages if passage.identity not in self._known}
        if asked:
            losses = asyncio.run(self._ask(list(asked.values())))
            self._known.update(zip(asked, losses, strict=True))
        return np.array([self._known[passage.identity] for passage in passages])

    async def _ask(self, passages: Sequence[Passage]) -> list[float]:
        client = SourceClient(self._address, self._application)
        try:
            losses = []
            for first in range(0, len(passages), _PASSAGES_AT_ONCE):
                for block in await client.score(passages[first : first + _PASSAGES_AT_ONCE], top_k=1):
                    losses.append(float(-block.gold_T[: block.num_text_tokens].sum(dtype=np.float64)))
            return losses
        finally:
            await client.close()


class Interventions:
    """The levels of the blocks of some documents, moved by what a source says.

    Attributes:
        levels: of every document's blocks.
    """

    def __init__(
        self,
        judge: Judge,
        examples: Sequence[Example],
        config: InterventionConfig,
        loss: AnswerLoss,
        *,
        block_tokens: int,
        seed: int,
    ) -> None:
        """Take examples with an answer; ValueError when there is none."""
        self._judge, self._config, self._loss, self._seed = judge, config, loss, seed
        self._examples = [example for example in examples if example.answer.strip()]
        if not self._examples:
            raise ValueError("recall.train.files: no example has an answer, whose loss would tell which block matters")
        read = [(example, judge.read(example.text, block_tokens)) for example in self._examples]
        fitting = [
            (example, document)
            for example, document in read
            if len(judge.question(example.question)) + max(document.tokens_in_window, default=0) <= judge.window_tokens
        ]
        if not fitting:
            raise ValueError(f"recall.train.files: no question leaves room for a block in {judge.window_tokens} tokens")
        self._examples, self._documents = (list(column) for column in zip(*fitting, strict=True))
        pairs = list(zip(self._examples, self._documents, strict=True))
        self._orders = [
            np.argsort(-bm25(example.question, document.blocks), kind="stable").tolist() for example, document in pairs
        ]
        self.levels = [start_levels(e.question, document.blocks, config.levels) for e, document in pairs]

    def labelled(self) -> list[Labelled]:
        """Return the documents with what their levels say now."""
        examples = []
        for example, document, order, levels_B in zip(
            self._examples, self._documents, self._orders, self.levels, strict=True
        ):
            chosen = relevant(levels_B)
            held, others = [b for b in order if chosen[b]], [b for b in order if not chosen[b]]
            examples.append(Labelled(document, self._judge.question(example.question), held, others))
        return examples

    def round(self, number: int) -> None:
        """Take blocks away from some documents, one at a time, and move their levels; raises ServiceError."""
        draw = np.random.default_rng((self._seed, number))
        count = min(self._config.documents, len(self._documents))
        for place in draw.choice(len(self._documents), size=count, replace=False).tolist():
            example, document, levels_B = self._examples[place], self._documents[place], self.levels[place]
            held = self._tried(example, document, levels_B)
            rises_H = differences(lambda texts, e=example, d=document: self._losses(e, d, texts), held)  # type: ignore[misc]
            self.levels[place] = moved(levels_B, held, rises_H, self._config.levels)

    def _tried(self, example: Example, document: Document, levels_B: NDArray[np.int8]) -> list[int]:
        """Return the blocks to take away: the relevant ones, the highest level first, and then the judge's best."""
        score_B = self._judge.score(example.question, document)
        order = np.lexsort((-score_B, -np.maximum(levels_B, 0)))
        return sorted(order[: self._config.blocks].tolist())

    def _losses(self, example: Example, document: Document, texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        passages = []
        for blocks in texts:
            before = "".join(document.blocks[block] for block in blocks)
            context = f"{before}\n\nQuestion: {example.question}\nAnswer:"
            passages.append(Passage(f" {example.answer.strip()}".encode(), context.encode()))
        return self._loss(passages)
