"""The reward service over gRPC: calls, streams with credits, limits, tokens, health; and scores of many callers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fusion.v1 import reward_pb2, reward_pb2_grpc
from services.base.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from services.models.revision import weights_revision
from services.reward.client import RewardClient, Scored, ScoreStream
from services.reward.config import RewardServiceConfig
from services.reward.model import RewardModel
from services.reward.scorer import BatchScorer
from services.reward.train import RewardJob
from services.rpc.health_check import health_of
from tests.fakes.services.plain_reward import plain_reward_service
from tests.reward.planted import DOMAINS, planted_pairs

ITEM = {"messages": b'[{"role": "user", "content": "the"}]', "answer": b"of", "domain": "brief"}


@pytest.fixture(scope="module")
def address(trained: RewardJob) -> Iterator[str]:
    config = RewardServiceConfig(model=str(trained.files.model), max_items=8, max_text_bytes=1000, batch_tokens=100)
    with plain_reward_service(config) as found:
        yield found


def asked(address: str, ask: Callable[[RewardClient], Any], **settings: Any) -> Any:
    async def main() -> Any:
        client = RewardClient(address, **settings)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(main())


def answers(number: int) -> list[Scored]:
    return [Scored(pair.messages, pair.chosen, pair.domain) for pair in planted_pairs(number, seed=5)]


def test_calls_and_streams_give_the_model_s_scores_in_order(address: str, trained: RewardJob) -> None:
    model, given = RewardModel.open(trained.files.model), answers(40)
    alone = [model.score([model.tokens.encode(a.messages, a.answer, a.domain)])[0] for a in given]

    async def streamed() -> list[float]:
        stream = ScoreStream(address, timeout_seconds=120)
        try:
            return await asyncio.gather(*map(stream.score, given))
        finally:
            await stream.close()

    assert asked(address, lambda client: client.score(given[:8])) == pytest.approx(alone[:8], abs=1e-4)
    assert asyncio.run(streamed()) == pytest.approx(alone, abs=1e-4)
    info = asked(address, lambda client: client.info())
    assert (dict(info.domains), info.max_tokens, info.max_items) == (DOMAINS, 96, 8)
    assert info.revision == weights_revision(trained.files.model)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "items: 1 to 8 are allowed, got 0"),
        ([ITEM] * 9, "items: 1 to 8 are allowed, got 9"),
        ([ITEM, ITEM | {"domain": "loud"}], r"items\[1\]\.domain: 'loud' is none of brief, rich"),
        ([ITEM | {"messages": b"{"}], r"items\[0\]\.messages: not JSON"),
        ([ITEM | {"messages": b"[]"}], r"items\[0\]\.messages: at least one"),
        ([ITEM | {"answer": b"a" * 1000}], r"items\[0\]: 1036 bytes, at most 1000 are allowed"),
        ([ITEM | {"answer": b"the " * 150}], r"items\[0\]: \d+ tokens; the model was trained on at most 96"),
    ],
)
def test_a_wrong_field_is_named(address: str, items: Sequence[Any], message: str) -> None:
    request = reward_pb2.RewardServiceScoreRequest(items=[reward_pb2.RewardItem(**item) for item in items])
    with pytest.raises(InvalidArgumentError, match=message):
        asked(address, lambda client: client._call(client._stub.Score, request, 60))


async def _frames(address: str, *messages: dict[str, Any]) -> AsyncIterator[Any]:
    async def requests() -> AsyncIterator[Any]:
        for message in messages:
            yield reward_pb2.RewardServiceStreamScoresRequest(**message)

    async with grpc.aio.insecure_channel(address) as channel:
        async for frame in reward_pb2_grpc.RewardServiceStub(channel).StreamScores(requests()):
            yield frame


def test_scores_come_only_for_credits(address: str) -> None:
    async def main() -> None:
        found, replica = 0, ""
        items = {"items": {"items": [ITEM] * 5}}
        async for frame in _frames(address, {"open": {}}, items, {"credit": {"blocks": 3}}):
            replica = replica or frame.replica
            found += len(frame.scores)
        assert (found, bool(replica)) == (3, True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        ([{"credit": {"blocks": 1}}], "INVALID_ARGUMENT", "a stream starts with `open`"),
        ([{"open": {}}, {"open": {}}], "INVALID_ARGUMENT", "expected items or credit, got open"),
        ([{"open": {}}, {"credit": {"blocks": 10**6}}], "INVALID_ARGUMENT", "reward.serve.per_client.blocks is 1024"),
        ([{"open": {}}, *[{"items": {"items": [ITEM] * 200}}] * 2], "RESOURCE_EXHAUSTED", "at most 256 may wait"),
        (
            [{"open": {}}, {"items": {"items": [ITEM] * 3}}, {"items": {"items": [ITEM | {"domain": ""}]}}],
            "INVALID_ARGUMENT",
            "items[3].domain",
        ),
    ],
)
def test_what_is_wrong_on_a_stream_ends_it(address: str, messages: list[Any], code: str, text: str) -> None:
    async def main() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in _frames(address, *messages):
                pass
        assert caught.value.code().name == code
        assert text in str(caught.value.details())

    asyncio.run(main())


def test_a_model_that_comes_later_is_opened_then(trained: RewardJob, tmp_path: Path) -> None:
    with plain_reward_service(RewardServiceConfig(model=str(tmp_path / "model"))) as address:
        assert health_of(address, "reward") == "NOT_SERVING"
        with pytest.raises(UnavailableError, match=r"there is none in .*; `fusion reward train` makes it"):
            asked(address, lambda client: client.score(answers(1)))
        shutil.copytree(trained.files.model, tmp_path / "model")
        assert health_of(address, "reward") == "SERVING"
        assert len(asked(address, lambda client: client.score(answers(3)))) == 3


def test_a_token_is_asked_for_and_a_large_request_refused(trained: RewardJob, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RewardServiceConfig.model_validate(
        {"model": str(trained.files.model), "per_client": {"request_bytes": 1000}}
    )
    with plain_reward_service(config) as address:
        with pytest.raises(ResourceExhaustedError, match=r"reward\.serve\.per_client\.request_bytes is 1000"):
            asked(address, lambda client: client.score(answers(40)))
        monkeypatch.setenv("FUSION_TOKEN", "right")
        assert len(asked(address, lambda client: client.score(answers(1)))) == 1
        with pytest.raises(grpc.RpcError) as caught, grpc.insecure_channel(address) as channel:
            reward_pb2_grpc.RewardServiceStub(channel).Score(reward_pb2.RewardServiceScoreRequest())
        assert caught.value.code() == UnauthenticatedError.code
        assert health_of(address, "reward") == "SERVING"


def test_a_deadline_is_kept(address: str) -> None:
    with pytest.raises(DeadlineExceededError):
        asked(address, lambda client: client.score(answers(8)), timeout_seconds=1e-4)


def test_callers_share_batches_and_a_failure_is_its_batch_s_alone() -> None:
    batches: list[list[int]] = []

    def score(conversations: Sequence[Any]) -> Any:
        batches.append([len(ids) for ids in conversations])
        if any(len(ids) == 7 for ids in conversations):
            raise RuntimeError("seven")
        return np.array([float(len(ids)) for ids in conversations])

    async def main() -> None:
        scorer = BatchScorer(score, batch_tokens=12)
        lengths = [2, 3, 4, 20, 7, 1]
        asked = [asyncio.create_task(scorer.score(np.zeros(length, dtype=np.int32))) for length in lengths]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[:4] == [2.0, 3.0, 4.0, 20.0]
        assert isinstance(found[4], RuntimeError)
        given_up = asyncio.create_task(scorer.score(np.zeros(5, dtype=np.int32)))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await scorer.score(np.zeros(6, dtype=np.int32)) == 6.0
        await scorer.close()

    asyncio.run(main())
    assert batches[:2] == [[2, 3, 4], [20]]
    assert max(max(batch) * len(batch) for batch in batches if batch != [20]) <= 14
    assert [6] in batches
