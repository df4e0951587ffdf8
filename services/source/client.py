"""Client of a source, used by the fusion service and the command line."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from fusion_core.blocks import Block
from services.common.auth import call_metadata
from services.common.channel import open_aio_channel
from services.common.errors import InvalidArgumentError, ServiceError, UnavailableError, error_of_call
from services.common.passage import Passage, contexts_of
from services.common.wire import decode_block

_DTYPE = block_pb2.LOGPROB_DTYPE_FLOAT16
"""Of calls and streams alike: a window that was scored again on its own is stored as if the stream had brought it."""


def _decode(message: block_pb2.TokenBlock, source: str) -> Block:
    """A broken block is the source's fault, not that of whoever sent the text."""
    try:
        return decode_block(message)
    except InvalidArgumentError as error:
        raise UnavailableError(f"source {source} sent a broken block: {error}") from error


class SourceClient:
    """Calls one source on the running event loop; a stream has a channel of its own."""

    def __init__(self, address: str, application: str, *, timeout_seconds: float = 600.0) -> None:
        self.address = address
        self.application = application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = source_pb2_grpc.SourceServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> source_pb2.GetSourceInfoResponse:
        """Raises ServiceError, UnavailableError when the source cannot be reached."""
        request = source_pb2.GetSourceInfoRequest()
        response: source_pb2.GetSourceInfoResponse = await self._call(
            self._stub.GetSourceInfo, request, timeout_seconds
        )
        return response

    async def score(self, passages: Sequence[Passage], *, top_k: int, expected_vocabulary: str = "") -> list[Block]:
        """Blocks for a few passages, in order."""
        request = source_pb2.ScoreRequest(
            texts=[passage.text for passage in passages],
            contexts=contexts_of(passages),
            top_k=top_k,
            expected_vocabulary=expected_vocabulary,
            dtype=_DTYPE,
        )
        response = await self._call(self._stub.Score, request, self._timeout_seconds)
        return [_decode(message, self.application) for message in response.blocks]

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        try:
            return await method(request, metadata=call_metadata(self.application), timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"source {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class ScoreStream:
    """One stream of texts to a source and of blocks back, in order, opened when the first text is sent.

    Every text is sent with the credit for its answer, so no more answers are under way than texts were submitted.
    When the stream breaks, every waiting text fails and the next one opens a new stream.
    """

    def __init__(self, address: str, application: str, *, top_k: int, expected_vocabulary: str = "") -> None:
        self._address = address
        self._application = application
        self._open = source_pb2.StreamScoresOpen(top_k=top_k, expected_vocabulary=expected_vocabulary, dtype=_DTYPE)
        self._waiting: deque[asyncio.Future[Block]] = deque()
        self._outbox: asyncio.Queue[Passage | None] = asyncio.Queue()
        self._running: asyncio.Task[None] | None = None

    async def score(self, passage: Passage) -> Block:
        """Raises ServiceError when the stream broke before the answer."""
        if self._running is None or self._running.done():
            self._outbox = asyncio.Queue()
            self._running = asyncio.create_task(self._run(self._outbox))
        answer: asyncio.Future[Block] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._outbox.put_nowait(passage)
        return await answer

    async def _run(self, outbox: asyncio.Queue[Passage | None]) -> None:
        problem: ServiceError = UnavailableError(f"source {self._application} at {self._address} ended the stream")
        try:
            async with open_aio_channel(self._address) as channel:
                stub = source_pb2_grpc.SourceServiceStub(channel)
                async for frame in stub.StreamScores(self._requests(outbox), metadata=call_metadata(self._application)):
                    for message in frame.blocks:
                        block = _decode(message, self._application)
                        if not self._waiting:
                            raise UnavailableError(f"source {self._application} sent a block for no text")
                        answer = self._waiting.popleft()
                        if not answer.done():  # its caller may have given up waiting
                            answer.set_result(block)
        except grpc.aio.AioRpcError as error:
            # A text sent while the source ends the stream fails locally with INTERNAL, and hides the real status.
            problem = error_of_call(error, f"source {self._application} at {self._address}")
        except ServiceError as error:
            problem = error
        finally:
            while self._waiting:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_exception(problem)

    async def _requests(self, outbox: asyncio.Queue[Passage | None]) -> AsyncIterator[source_pb2.StreamScoresRequest]:
        yield source_pb2.StreamScoresRequest(open=self._open)
        while (passage := await outbox.get()) is not None:
            passages = [passage]
            while not outbox.empty() and len(passages) < 64 and (more := outbox.get_nowait()) is not None:
                passages.append(more)
            texts = source_pb2.ScoreTexts(texts=[p.text for p in passages], contexts=contexts_of(passages))
            yield source_pb2.StreamScoresRequest(texts=texts)
            yield source_pb2.StreamScoresRequest(credit=block_pb2.Credit(blocks=len(passages)))

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
