"""The recall service over gRPC: calls, streams with credits, limits, deadlines, tokens, health."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.v1 import recall_pb2, recall_pb2_grpc
from services.base.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from services.deploy.local_ray import free_port
from services.recall.client import KeyBlockStream, LongText, RecallClient
from services.recall.config import RecallConfig
from services.recall.judge import Judge
from services.rpc.health_check import health_of
from tests.fakes.files.tiny_encoder import write_encoder
from tests.fakes.services.plain_recall import ScriptedJudge, plain_recall

LINES = [f"line {number:02} {'😀木é'[number % 3]}\n" for number in range(40)]
LINES[7], LINES[30] = "the key 木 is QXZ\n", "and QX 😀 again\n"
TEXT = "".join(LINES).encode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    config = RecallConfig(max_documents=4, max_text_bytes=2000, max_question_bytes=300)
    with plain_recall(config, ScriptedJudge()) as found:
        yield found


def asked(address: str, ask: Callable[[RecallClient], Any], **options: Any) -> Any:
    async def main() -> Any:
        client = RecallClient(address, **options)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(main())


def key_blocks(address: str, text: bytes, question: str, **chosen: Any) -> recall_pb2.KeyBlocks:
    chosen = {"hops": [2], **chosen}
    [found] = asked(
        address, lambda client: client.select([LongText(text, question)], recall_pb2.RecallSettings(**chosen))
    )
    return found


def lines_of(found: recall_pb2.KeyBlocks, text: bytes) -> list[str]:
    return [text[block.start_byte : block.end_byte].decode() for block in found.blocks]


def test_blocks_slice_the_bytes_and_carry_score_and_hop(address: str) -> None:
    found = key_blocks(address, TEXT, "QXZ", budget_bytes=len((LINES[7] + LINES[30]).encode()))
    assert lines_of(found, TEXT) == [LINES[7], LINES[30]]
    assert [block.score for block in found.blocks] == pytest.approx([1, 2 / 3])
    assert [block.hop for block in found.blocks] == [1, 1]
    assert [block.num_tokens for block in found.blocks] == [len(LINES[7]), len(LINES[30])]
    assert (found.num_blocks, found.text_bytes) == (40, len(TEXT))


def test_a_budget_counts_bytes_or_tokens_and_what_only_fills_it_has_no_hop(address: str) -> None:
    both = len((LINES[7] + LINES[30]).encode())
    short = lines_of(key_blocks(address, TEXT, "QXZ", budget_bytes=both - 1), TEXT)
    assert LINES[7] in short
    assert LINES[30] not in short
    in_tokens = key_blocks(address, TEXT, "QXZ", budget_tokens=len(LINES[7] + LINES[30]))
    assert lines_of(in_tokens, TEXT) == [LINES[7], LINES[30]]
    more = key_blocks(address, TEXT, "QXZ", budget_bytes=both + len(LINES[0].encode()))
    assert lines_of(more, TEXT) == [LINES[0], LINES[7], LINES[30]]  # of equal scores the first one fills it
    assert [block.hop for block in more.blocks] == [0, 1, 1]
    assert lines_of(key_blocks(address, TEXT, "QXZ", budget_bytes=10**6), TEXT) == LINES
    assert key_blocks(address, TEXT, "QXZ", budget_bytes=1).num_blocks == 40


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=120).filter(lambda text: text.isprintable() or "\n" in text), st.integers(1, 200))
def test_any_text_is_sliced_losslessly(address: str, text: str, budget: int) -> None:
    data = text.encode(errors="replace")[:2000]
    every = key_blocks(address, data, "?", budget_bytes=10**6, hops=[64])
    assert b"".join(data[b.start_byte : b.end_byte] for b in every.blocks) == data
    some = key_blocks(address, data, "?", budget_bytes=budget)
    assert sum(b.end_byte - b.start_byte for b in some.blocks) <= budget
    assert {b.start_byte for b in some.blocks} <= {b.start_byte for b in every.blocks}


def test_a_trained_judge_of_a_folder_reads_any_script(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Judge.load(write_encoder(tmp_path), fresh=True).save(tmp_path / "judge")
    text = ("Anna lives in the city 😀. Boris was 木の下で river! " * 60).encode()
    with plain_recall(RecallConfig(judge=str(tmp_path / "judge"))) as address:
        info = asked(address, lambda client: client.info())
        assert (info.judge, len(info.revision)) == (str(tmp_path / "judge"), 32)
        assert (info.max_block_tokens, list(info.defaults.hops), info.defaults.budget_bytes) == (16, [3, 5], 4096)
        found = key_blocks(address, text, "Where is Anna?", budget_bytes=400, hops=[1, 2])
        assert found.blocks
        assert all(0 <= b.score <= 1 and b.num_tokens <= 16 for b in found.blocks)
        assert sum(len(line.encode()) for line in lines_of(found, text)) <= 400
        with pytest.raises(InvalidArgumentError, match=r"documents\[0\]\.question: .* do not fit the judge's window"):
            key_blocks(address, text, "Where? " * 500)


@pytest.mark.parametrize(
    ("documents", "chosen", "message"),
    [
        ([], {}, "documents: 1 to 4 are allowed, got 0"),
        ([LongText(b"a", "b")] * 5, {}, "documents: 1 to 4 are allowed, got 5"),
        ([LongText(b"a", "b"), LongText(b"", "b")], {}, r"documents\[1\]\.text: must not be empty"),
        ([LongText(b"a", "")], {}, r"documents\[0\]\.question: must not be empty"),
        ([LongText(b"a" * 2001, "b")], {}, r"documents\[0\]\.text: 2001 bytes, at most 2000 are allowed"),
        ([LongText(b"a", "b" * 301)], {}, r"documents\[0\]\.question: 301 bytes, at most 300 are allowed"),
        ([LongText(b"ab\xff", "b")], {}, r"documents\[0\]\.text: not UTF-8 at byte 2"),
        ([LongText(b"a", "b" * 250)], {}, r"documents\[0\]\.question: its 250 tokens and a block"),
        ([LongText(b"a", "b")], {"budget_bytes": 0}, "settings.budget_bytes: must be at least 1"),
        ([LongText(b"a", "b")], {"budget_tokens": 0}, "settings.budget_tokens: must be at least 1"),
        ([LongText(b"a", "b")], {"hops": [0]}, "settings.hops: 1 to 8 numbers of 1 to 64"),
        ([LongText(b"a", "b")], {"hops": [1] * 9}, "settings.hops: 1 to 8 numbers of 1 to 64"),
    ],
)
def test_a_wrong_field_is_named(address: str, documents: list[LongText], chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{message}"):
        asked(address, lambda client: client.select(documents, recall_pb2.RecallSettings(**chosen)))


def test_a_caller_that_waits_no_longer_stops_the_judge() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(num_windows: int) -> None:
        begun.set()
        assert go_on.wait(60)

    judge = ScriptedJudge(hold)
    text = b"some words of this\n" * 2000
    with plain_recall(RecallConfig(), judge) as address:
        with pytest.raises(DeadlineExceededError):
            key_blocks_with_timeout(address, text, 3.0)
        assert begun.is_set()  # the judge was at work while its caller left
        go_on.set()
        assert lines_of(key_blocks(address, b"a\nb\n", "b", budget_bytes=2), b"a\nb\n") == ["b\n"]
    assert judge.scored < 100  # the text has 200 windows


def key_blocks_with_timeout(address: str, text: bytes, seconds: float) -> Any:
    return asked(address, lambda client: client.select([LongText(text, "?")]), timeout_seconds=seconds)


async def streamed(address: str, documents: Any, **options: Any) -> list[Any]:
    stream = KeyBlockStream(address, **options)
    try:
        return [found async for found in stream.in_order(documents)]
    finally:
        await stream.close()


def test_a_stream_gives_what_calls_give_in_order_and_a_refused_text_stops_no_other(address: str) -> None:
    texts = [f"first {n}\nsecond X{n}\n".encode() for n in range(40)]
    documents = [LongText(text, "X") for text in texts]
    documents[11], documents[12] = LongText(b"", "X"), LongText(b"\xff", "X")
    chosen = recall_pb2.RecallSettings(budget_bytes=11, hops=[1])
    found = asyncio.run(streamed(address, documents, settings=chosen))
    for number, (each, document) in enumerate(zip(found, documents, strict=True)):
        if number in {11, 12}:
            assert isinstance(each, InvalidArgumentError)
        else:
            assert lines_of(each, document.text) == [f"second X{number}\n"]


def test_a_restart_under_a_stream_loses_nothing_and_repeats_nothing() -> None:
    port, enough, down = free_port(), threading.Event(), threading.Event()
    asked_for = itertools.count(1)

    def count(num_windows: int) -> None:
        if next(asked_for) == 25:
            enough.set()
            down.wait(60)  # the service goes while texts are under way

    texts = [f"a {number}\nb X{number}\n".encode() for number in range(60)]
    found: list[Any] = []

    def consume() -> None:
        chosen = recall_pb2.RecallSettings(budget_bytes=7, hops=[1])
        documents = (LongText(text, "X") for text in texts)
        found.extend(asyncio.run(streamed(f"127.0.0.1:{port}", documents, settings=chosen, attempts=20)))

    consumer = threading.Thread(target=consume)
    with plain_recall(RecallConfig(), ScriptedJudge(count), port=port):
        consumer.start()
        assert enough.wait(60)
        threading.Timer(0.0, down.set).start()
    with plain_recall(RecallConfig(), ScriptedJudge(), port=port):
        consumer.join(120)
    wanted = [[f"b X{number}\n"] for number in range(60)]
    assert [lines_of(each, text) for each, text in zip(found, texts, strict=True)] == wanted


async def _frames(address: str, *messages: dict[str, Any]) -> AsyncIterator[recall_pb2.StreamKeyBlocksResponse]:
    async def requests() -> AsyncIterator[recall_pb2.StreamKeyBlocksRequest]:
        for message in messages:
            yield recall_pb2.StreamKeyBlocksRequest(**message)

    async with grpc.aio.insecure_channel(address) as channel:
        async for frame in recall_pb2_grpc.RecallServiceStub(channel).StreamKeyBlocks(requests()):
            yield frame


def test_key_blocks_come_only_for_credits(address: str) -> None:
    async def main() -> None:
        documents = {"documents": {"documents": [{"text": b"a\nb\n", "question": b"a"}] * 5}}
        found, replica = 0, ""
        async for frame in _frames(address, {"open": {}}, documents, {"credit": {"blocks": 3}}):
            replica = replica or frame.replica
            found += len(frame.found)
        assert (found, bool(replica)) == (3, True)

    asyncio.run(main())


GOOD = {"text": b"a\nb\n", "question": b"a"}


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        ([{"credit": {"blocks": 1}}], "INVALID_ARGUMENT", "a stream starts with `open`"),
        ([{"open": {}}, {"open": {}}], "INVALID_ARGUMENT", "expected documents or credit, got open"),
        ([{"open": {"settings": {"hops": [65]}}}], "INVALID_ARGUMENT", "settings.hops"),
        ([{"open": {}}, {"credit": {"blocks": 10**6}}], "INVALID_ARGUMENT", "recall.per_client.blocks is 1024"),
        (
            [{"open": {}}, *[{"documents": {"documents": [GOOD] * 10}}] * 2],
            "RESOURCE_EXHAUSTED",
            "at most 16 may wait for credits",
        ),
        (
            [{"open": {}}, {"documents": {"documents": [GOOD] * 3}}, {"documents": {"documents": [{"text": b"a"}]}}],
            "INVALID_ARGUMENT",
            "documents[3].question",
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


def test_a_token_is_asked_for_and_a_large_request_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"request_bytes": 1000}
    with plain_recall(RecallConfig(per_client=limits), ScriptedJudge()) as address:  # type: ignore[arg-type]
        with pytest.raises(ResourceExhaustedError, match=r"recall\.per_client\.request_bytes is 1000"):
            key_blocks(address, b"a" * 1000, "a")
        monkeypatch.setenv("FUSION_TOKEN", "right")
        assert key_blocks(address, b"a\n", "a").blocks
        with pytest.raises(grpc.RpcError) as caught, grpc.insecure_channel(address) as channel:
            recall_pb2_grpc.RecallServiceStub(channel).SelectKeyBlocks(recall_pb2.SelectKeyBlocksRequest())
        assert caught.value.code() == UnauthenticatedError.code
        assert health_of(address, "recall") == "SERVING"
