"""`fusion reward score`: score the answers of a file with a reward model, here or where one is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from fusion_core.arrays import Int32
from services.base.atomic import whole_file
from services.base.errors import InvalidArgumentError
from services.commands.answers.rows import answer_of, asked_of, json_rows
from services.reward.client import Scored, ScoreStream
from services.reward.model import RewardModel

Score: TypeAlias = Callable[[Sequence[Scored], Sequence[str]], Awaitable[list[float]]]
"""A function from answers, and the places of their rows for messages, to their scores."""
_ROWS_AT_ONCE = 256


@dataclass(slots=True)
class Summary:
    """The scores of the answers of one source in one domain."""

    answers: int = 0
    total: float = 0.0
    least: float = float("inf")
    largest: float = float("-inf")

    def add(self, score: float) -> None:
        self.answers, self.total = self.answers + 1, self.total + score
        self.least, self.largest = min(self.least, score), max(self.largest, score)


@dataclass(slots=True)
class ScoreAnswers:
    """One run of the command.

    Attributes:
        answers: JSON lines with the answers, as `fusion sample --to` writes them.
        domain: of rows that name none.
        model: folder of the reward model, for scoring in this process.
        address: host:port of a reward service; then `model` is not used.
        application: of that service.
        summaries: results by source and domain.
    """

    answers: Path
    domain: str | None = None
    model: Path | None = None
    address: str | None = None
    application: str = "reward"
    summaries: dict[tuple[str, str], Summary] = field(default_factory=dict)

    def run(self, to: Path | None = None) -> None:
        """Score all answers; write the rows with their `reward` to `to`.

        Raises ValueError naming file, line and key that is wrong, ServiceError when an answer cannot be scored.
        """
        if to is None:
            asyncio.run(self._score_all(None))
            return
        with whole_file(to) as partial, partial.open("w", encoding="utf-8") as lines:
            asyncio.run(self._score_all(lines))

    async def _score_all(self, lines: Any) -> None:
        rows = json_rows(self.answers)
        async with AsyncExitStack() as stack:
            score = self._scorer(stack)
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                asked = [self._asked(row, where) for where, row in some]
                scores = await score(asked, [where for where, _ in some])
                for (_, row), answer, value in zip(some, asked, scores, strict=True):
                    self.summaries.setdefault((str(row.get("source", "")), answer.domain), Summary()).add(value)
                    if lines is not None:
                        found = {**row, "domain": answer.domain, "reward": value}
                        lines.write(json.dumps(found, ensure_ascii=False) + "\n")

    def _scorer(self, stack: AsyncExitStack) -> Score:
        if self.address is not None:
            stream = ScoreStream(self.address, self.application)
            stack.push_async_callback(stream.close)

            async def served(asked: Sequence[Scored], places: Sequence[str]) -> list[float]:
                try:
                    return await asyncio.gather(*map(stream.score, asked))
                except InvalidArgumentError as error:  # it names the item by its number since the first row
                    raise ValueError(f"{places[0]} or one of the rows after it: {error}") from error

            return served
        if self.model is None:
            raise ValueError("--model: needed, or --address of a reward service")
        model = RewardModel.open(self.model)

        async def here(asked: Sequence[Scored], places: Sequence[str]) -> list[float]:
            ids = [_encoded(model, item, where) for item, where in zip(asked, places, strict=True)]
            return list(map(float, model.score(ids)))

        return here

    def _asked(self, row: dict[str, Any], where: str) -> Scored:
        answer, messages = answer_of(row, where), asked_of(row, where)
        domain = row.get("domain", self.domain)
        if not isinstance(domain, str):
            raise ValueError(f"{where}: domain: neither the row nor --domain names one")
        return Scored(messages, answer, domain)


def _encoded(model: RewardModel, item: Scored, where: str) -> Int32:
    """Return an answer in the model's tokens; raises ValueError naming the row that cannot be scored."""
    try:
        ids = model.tokens.encode(item.messages, item.answer, item.domain)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(ids) > model.card.max_tokens:
        raise ValueError(f"{where}: {len(ids)} tokens; the model was trained on at most {model.card.max_tokens}")
    return ids
