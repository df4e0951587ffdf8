"""A text that the model has no answer to is refused alone; an answer that fits no message, before any work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from fusion.v1 import block_pb2, source_pb2
from services.base.errors import InvalidArgumentError, UnavailableError
from services.source.config import SourceConfig
from services.source.engines.base import PromptScores
from services.source.servicer import SourceServicer
from tests.fakes.tiny_model import make_tiny_model
from tests.source.test_canary import Context

GOOD = b"the man said that it was time"
BAD = b"Q"
"""Every text with this letter makes the engine answer nonsense."""


def nan(scores: PromptScores) -> None:
    scores.topk_logprobs_TK[-1, 0] = np.nan


def uniform(scores: PromptScores) -> None:
    scores.topk_logprobs_TK[:] = scores.gold_T[:] = -np.log(400)


def excess(scores: PromptScores) -> None:
    scores.topk_logprobs_TK[0, :] = np.log(0.9)


def beyond(scores: PromptScores) -> None:
    scores.topk_ids_TK[0] = 400 + np.arange(scores.topk_ids_TK.shape[1])


class Spoiled:
    """A real source whose engine answers nonsense to some texts, and counts what it is asked."""

    def __init__(self, servicer: SourceServicer, spoil: Callable[[PromptScores], None]) -> None:
        self.servicer = servicer
        self.asked = 0
        self.at_once = 0
        self.refused = 0
        scorer = servicer._scorer
        self._bad_id = scorer.vocabulary.encode_batch([BAD])[0].token_ids_T[-1]
        self._spoil = spoil
        self._engine_score = scorer.engine.score
        scorer.engine.score = self._score  # type: ignore[method-assign]
        scorer.metrics.texts_refused.inc = self._count  # type: ignore[method-assign]

    def _count(self) -> None:
        self.refused += 1

    async def _score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        self.asked += 1
        self.at_once += 1
        try:
            scores = await self._engine_score(prompt_ids, top_k)
        finally:
            self.at_once -= 1
        if self._bad_id in prompt_ids:
            scores = PromptScores(scores.gold_T.copy(), scores.topk_ids_TK.copy(), scores.topk_logprobs_TK.copy())
            self._spoil(scores)
        return scores

    async def score(self, *texts: bytes, **settings: Any) -> source_pb2.ScoreResponse:
        request = source_pb2.ScoreRequest(texts=texts, **settings)
        response: source_pb2.ScoreResponse = await self.servicer.Score(request, grpc_context=Context())  # type: ignore[call-arg]
        return response

    async def stream(self, *texts: bytes) -> list[source_pb2.StreamScoresResponse]:
        async def requests() -> Any:
            yield source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen())
            yield source_pb2.StreamScoresRequest(texts=source_pb2.ScoreTexts(texts=texts))
            yield source_pb2.StreamScoresRequest(credit={"blocks": len(texts)})

        return [frame async for frame in self.servicer.StreamScores(requests(), grpc_context=Context())]  # type: ignore[call-arg]

    async def is_serving(self) -> bool:
        check = self.servicer.Check(health_pb2.HealthCheckRequest(), grpc_context=Context())  # type: ignore[call-arg]
        return bool((await check).status == health_pb2.HealthCheckResponse.SERVING)


Run = Callable[[Spoiled], Awaitable[None]]


@pytest.fixture
def with_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=2)

    def with_source(run: Run, spoil: Callable[[PromptScores], None] = nan, **settings: Any) -> None:
        async def main() -> None:
            servicer = SourceServicer.__new__(SourceServicer)
            values = {"name": "tiny", "model": str(folder), "engine": "transformers", "top_k": 8} | settings
            await servicer.__init__(SourceConfig.model_validate(values))  # type: ignore[misc]  # as Serve does
            async with asyncio.timeout(120):
                await run(Spoiled(servicer, spoil))
            await servicer.close()

        asyncio.run(main())

    return with_source


@pytest.mark.parametrize("spoil", [nan, uniform, excess, beyond])
def test_one_bad_text_takes_the_source_from_nobody(
    with_source: Callable[..., None], spoil: Callable[[PromptScores], None]
) -> None:
    async def run(source: Spoiled) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^texts\[1\]: the model has no answer to this text: "):
            await source.score(GOOD, GOOD + BAD)
        with pytest.raises(InvalidArgumentError, match=r"^the model has no answer to this text: "):
            await source.stream(GOOD + BAD)
        assert source.refused == 2
        assert await source.is_serving()
        assert len((await source.score(GOOD)).blocks) == 1
        assert sum(len(frame.blocks) for frame in await source.stream(GOOD, GOOD)) == 2

    with_source(run, spoil)


def test_the_same_bad_text_may_come_often(with_source: Callable[..., None]) -> None:
    async def run(source: Spoiled) -> None:
        for _ in range(20):
            with pytest.raises(InvalidArgumentError):
                await source.score(BAD)
        assert await source.is_serving()

    with_source(run)


def test_different_bad_texts_in_a_row_break_the_source(with_source: Callable[..., None]) -> None:
    """Seven and seven with an answer between them do not; eight do, although the canary is sound."""

    async def run(source: Spoiled) -> None:
        for first in (0, 7):
            for number in range(first, first + 7):
                with pytest.raises(InvalidArgumentError):
                    await source.score(BAD + b"%d" % number)
            await source.score(GOOD)
        for number in range(7):
            with pytest.raises(InvalidArgumentError):
                await source.score(BAD + b"%d" % number)
        with pytest.raises(UnavailableError, match="8 different texts in a row have no answer: the model answers with"):
            await source.score(BAD + b"last")
        assert not await source.is_serving()
        with pytest.raises(UnavailableError):
            await source.score(GOOD)

    with_source(run)


def test_many_bad_texts_at_once_ask_for_one_canary(with_source: Callable[..., None]) -> None:
    async def run(source: Spoiled) -> None:
        results = await asyncio.gather(*(source.score(BAD) for _ in range(10)), return_exceptions=True)
        assert all(isinstance(result, InvalidArgumentError) for result in results)
        assert source.asked <= 10 + 2 * 3  # the canary has three texts

    with_source(run)


def test_a_failure_ends_its_siblings(with_source: Callable[..., None]) -> None:
    """What is still being scored for a call that has failed would be counted for nobody."""

    async def run(source: Spoiled) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^texts\[0\]"):
            await source.score(BAD, *[GOOD] * 99)
        assert source.at_once == 0
        assert source.servicer._scorer.admission.tokens_in_flight == 0
        asked = source.asked
        await asyncio.sleep(0)
        assert source.asked == asked

    with_source(run, max_tokens=60, max_tokens_in_flight=61)


LARGE = {"top_k": 400, "max_tokens": 2047}


def test_an_answer_that_fits_no_message_is_refused_before_the_work(with_source: Callable[..., None]) -> None:
    text = GOOD * 10

    async def run(source: Spoiled) -> None:
        num_tokens = len(source.servicer._scorer.vocabulary.encode_batch([text])[0].token_ids_T)
        num_texts = 64 * 2**20 // (num_tokens * 400 * 8) + 1
        assert num_texts <= 256
        before = source.asked
        for settings in (
            {"dtype": block_pb2.LOGPROB_DTYPE_FLOAT32},
            {"dtype": block_pb2.LOGPROB_DTYPE_FLOAT32, "top_k": 400},
        ):
            with pytest.raises(InvalidArgumentError, match=r"^texts: with 400 candidates a token the answer can take"):
                await source.score(*[text] * num_texts, **settings)
        assert source.asked == before
        response = await source.score(*[text] * num_texts, top_k=2)
        assert len(response.blocks) == num_texts

    with_source(run, engine="synthetic", **LARGE)


def test_a_replica_that_is_told_to_stop_ends_its_engine_when_nobody_needs_it(with_source: Callable[..., None]) -> None:
    async def run(source: Spoiled) -> None:
        closed: list[int] = []
        source.servicer._scorer.engine.close = lambda: closed.append(source.at_once)  # type: ignore[method-assign]
        calls = [asyncio.create_task(source.score(*[GOOD] * 20)) for _ in range(3)]
        while source.asked < 5:
            await asyncio.sleep(0)
        source.servicer._draining.begin()
        for response in await asyncio.gather(*calls):
            assert len(response.blocks) == 20
        while not closed:
            await asyncio.sleep(0.01)
        assert set(closed) == {0}
        with pytest.raises(UnavailableError, match="draining"):
            await source.score(GOOD)

    with_source(run)
