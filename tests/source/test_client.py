"""The stream to a source against a plain gRPC server: order, broken blocks, refusals, reconnection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from fusion.v1 import source_pb2, source_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from services.source.client import ScoreStream
from services.wire.block import encode_block
from services.wire.passage import Passage
from tests.fakes.blocks import random_block


class Scripted(source_pb2_grpc.SourceServiceServicer):
    """Answers every text with a block of that text; some texts make it misbehave."""

    def __init__(self) -> None:
        self.streams = 0

    async def StreamScores(self, requests: Any, context: Any) -> Any:  # noqa: N802
        self.streams += 1
        async for message in requests:
            for text in message.texts.texts:
                block = encode_block(replace(random_block(1), text_bytes=text, byte_ends_T=np.int32([len(text)])))
                if text == b"too long":
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "texts[0]: too long")
                if text == b"broken":
                    block.gold = np.float32([np.nan]).tobytes()
                if text == b"swapped":
                    block.text = b"another"
                if text == b"vanish":
                    return
                if text.startswith(b"slow"):
                    await asyncio.sleep(float(text.split()[1]))
                answers = [block, block] if text == b"twice" else [block]
                yield source_pb2.StreamScoresResponse(blocks=answers)


def with_server(
    run: Callable[[ScoreStream, Scripted], Awaitable[None]], *, timeout_seconds: float | None = None
) -> None:
    async def main() -> None:
        server, servicer = grpc.aio.server(), Scripted()
        source_pb2_grpc.add_SourceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stream = ScoreStream(f"127.0.0.1:{port}", "s", top_k=4, timeout_seconds=timeout_seconds)
        try:
            async with asyncio.timeout(60):
                await run(stream, servicer)
        finally:
            await stream.close()
            await server.stop(None)

    asyncio.run(main())


def test_answers_keep_their_order_on_one_stream() -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        texts = [f"text {n}".encode() for n in range(200)]
        blocks = await asyncio.gather(*(stream.score(Passage(text)) for text in texts))
        assert [block.text_bytes for block in blocks] == texts
        assert servicer.streams == 1

    with_server(run)


@pytest.mark.parametrize(
    ("text", "error"),
    [(b"vanish", UnavailableError), (b"too long", InvalidArgumentError)],
)
def test_a_refused_text_fails_at_once_and_the_next_text_finds_a_new_stream(text: bytes, error: type[Exception]) -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        with pytest.raises((error, UnavailableError)):
            await stream.score(Passage(text))
        assert (await stream.score(Passage(b"good"))).text_bytes == b"good"
        assert servicer.streams == 2

    with_server(run)


def test_a_broken_block_fails_its_own_text_only() -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        texts = [b"before", b"broken", b"behind"]
        before, broken, behind = await asyncio.gather(
            *(stream.score(Passage(text)) for text in texts), return_exceptions=True
        )
        assert isinstance(broken, UnavailableError)
        assert [b.text_bytes for b in (before, behind) if isinstance(b, Block)] == [b"before", b"behind"]
        assert servicer.streams == 1

    with_server(run)


def test_a_block_of_another_text_breaks_the_stream() -> None:
    """What comes behind it would belong to other texts as well."""

    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        texts = [b"swapped", b"behind"]
        answers = await asyncio.gather(*(stream.score(Passage(text)) for text in texts), return_exceptions=True)
        assert all(isinstance(answer, UnavailableError) for answer in answers)
        assert (await stream.score(Passage(b"good"))).text_bytes == b"good"
        assert servicer.streams == 2

    with_server(run)


def test_a_silent_source_fails_all_waiting_texts_after_one_deadline() -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        assert (await stream.score(Passage(b"good"))).text_bytes == b"good"
        started = time.monotonic()
        texts = [b"slow 30", *(b"%d" % number for number in range(50))]
        answers = await asyncio.gather(*(stream.score(Passage(text)) for text in texts), return_exceptions=True)
        assert all(isinstance(answer, DeadlineExceededError) for answer in answers)
        assert len({id(answer) for answer in answers}) == 1  # one failure, not fifty-one
        assert time.monotonic() - started < 5
        # What comes next is asked on a stream of its own: no answer of the old one can be taken for its.
        assert (await stream.score(Passage(b"next"))).text_bytes == b"next"
        assert servicer.streams == 2

    with_server(run, timeout_seconds=0.5)


def test_a_slow_source_has_its_deadline_for_every_answer_and_an_idle_stream_has_none() -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        texts = [b"slow 0.3 %d" % number for number in range(5)]  # together far above the deadline
        blocks = await asyncio.gather(*(stream.score(Passage(text)) for text in texts))
        assert [block.text_bytes for block in blocks] == texts
        await asyncio.sleep(1.2)
        assert (await stream.score(Passage(b"good"))).text_bytes == b"good"
        assert servicer.streams == 1

    with_server(run, timeout_seconds=0.9)


def test_a_block_for_no_text_breaks_the_stream() -> None:
    async def run(stream: ScoreStream, servicer: Scripted) -> None:
        answers = [stream.score(Passage(b"twice"))]
        results: list[Block | BaseException] = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(results[0], Block | UnavailableError)
        assert (await stream.score(Passage(b"good"))).text_bytes == b"good"

    with_server(run)


def test_credits_are_sent_for_every_text() -> None:
    granted = 0

    class Counting(source_pb2_grpc.SourceServiceServicer):
        async def StreamScores(self, requests: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
            nonlocal granted
            waiting: list[bytes] = []
            async for message in requests:
                waiting += message.texts.texts
                granted += message.credit.blocks
                if message.WhichOneof("message") == "credit":
                    assert message.credit.blocks == len(waiting)
                    frame = [
                        encode_block(replace(random_block(1), text_bytes=t, byte_ends_T=np.int32([len(t)])))
                        for t in waiting
                    ]
                    waiting = []
                    yield source_pb2.StreamScoresResponse(blocks=frame)

    async def main() -> None:
        server = grpc.aio.server()
        source_pb2_grpc.add_SourceServiceServicer_to_server(Counting(), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stream = ScoreStream(f"127.0.0.1:{port}", "s", top_k=4)
        await asyncio.gather(*(stream.score(Passage(f"text {n}".encode())) for n in range(50)))
        await stream.close()
        await server.stop(None)

    asyncio.run(main())
    assert granted == 50
