"""Client of a source, used by the fusion service and the command line."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, InvalidArgumentError, ServiceError, UnavailableError
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.status import error_of_call
from services.wire.block import decode_block
from services.wire.passage import Passage, contexts_of

_DTYPE = block_pb2.LOGPROB_DTYPE_FLOAT16
"""Calls and streams use the same dtype, so a retried window is stored exactly like a streamed one."""


def _decode(message: block_pb2.TokenBlock, source: str) -> Block:
    """Decode a block; raises UnavailableError for a broken one, which is the source's fault and not its caller's."""
    try:
        return decode_block(message)
    except InvalidArgumentError as error:
        raise UnavailableError(f"source {source} sent a broken block: {error}") from error


class SourceClient:
    """A client of one source, on the running event loop; a stream has a channel of its own."""

    def __init__(self, address: str, application: str, *, timeout_seconds: float = 600.0) -> None:
        self.address = address
        self.application = application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = source_pb2_grpc.SourceServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> source_pb2.GetSourceInfoResponse:
        """Return the source's description; raises ServiceError: UnavailableError when it cannot be reached."""
        request = source_pb2.GetSourceInfoRequest()
        response: source_pb2.GetSourceInfoResponse = await self._call(
            self._stub.GetSourceInfo, request, timeout_seconds
        )
        return response

    async def score(self, passages: Sequence[Passage], *, top_k: int, expected_vocabulary: str = "") -> list[Block]:
        """Return the blocks of a few passages, in order; raises ServiceError."""
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
            metadata = (*call_metadata(self.application), *timeout_metadata(timeout_seconds))
            return await method(request, metadata=metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"source {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class ScoreStream:
    """One stream of texts to a source and of blocks back, in order, opened when the first text is sent.

    Every text is sent with the credit for its answer, so no more answers are under way than texts were submitted.
    When the stream breaks, every waiting text fails and the next one opens a new stream. A source that owes answers and
    sends none for `timeout_seconds` breaks it too, with DeadlineExceededError, however many texts wait.
    """

    def __init__(
        self,
        address: str,
        application: str,
        *,
        top_k: int,
        expected_vocabulary: str = "",
        timeout_seconds: float | None = None,
    ) -> None:
        self._address = address
        self._application = application
        self._timeout_seconds = timeout_seconds
        self._open = source_pb2.StreamScoresOpen(top_k=top_k, expected_vocabulary=expected_vocabulary, dtype=_DTYPE)
        self._connection: _Connection | None = None

    @property
    def broken(self) -> bool:
        """True when the stream has ended since it was last opened."""
        return self._connection is not None and self._connection.broken

    @property
    def replica(self) -> str:
        """The name of the replica that serves the stream; empty until the replica has sent it."""
        connection = self._connection
        return connection.landed.result() if connection is not None and connection.landed.done() else ""

    async def landed(self) -> str:
        """Open the stream if needed and return the name of its replica; empty when the stream ends without one."""
        return await asyncio.shield(self._opened().landed)

    async def score(self, passage: Passage) -> Block:
        """Return the block of a passage; raises ServiceError when the stream broke before the answer."""
        return await self._opened().score(passage)

    def _opened(self) -> _Connection:
        if self._connection is None or self._connection.broken:
            self._connection = _Connection(self._address, self._application, self._open, self._timeout_seconds)
        return self._connection

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


class _Connection:
    """One connection of a `ScoreStream`, until it breaks. It answers the texts sent on it, and no others."""

    def __init__(
        self, address: str, application: str, opening: source_pb2.StreamScoresOpen, timeout_seconds: float | None
    ) -> None:
        self.broken = False
        self._where = f"source {application} at {address}"
        self._application = application
        self._opening = opening
        self._timeout_seconds = timeout_seconds
        self.landed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting: deque[tuple[Passage, asyncio.Future[Block]]] = deque()
        self._outbox: asyncio.Queue[Passage] = asyncio.Queue()
        self._silence: asyncio.TimerHandle | None = None
        self._running = asyncio.create_task(self._run(address))

    async def score(self, passage: Passage) -> Block:
        answer: asyncio.Future[Block] = asyncio.get_running_loop().create_future()
        self._waiting.append((passage, answer))
        if len(self._waiting) == 1:
            self._listen()
        self._outbox.put_nowait(passage)
        return await answer

    async def _run(self, address: str) -> None:
        problem: ServiceError = UnavailableError(f"{self._where} ended the stream")
        try:
            async with open_aio_channel(address) as channel:
                stub = source_pb2_grpc.SourceServiceStub(channel)
                try:
                    async for frame in stub.StreamScores(self._requests(), metadata=call_metadata(self._application)):
                        if not self.landed.done():
                            self.landed.set_result(frame.replica)
                        for message in frame.blocks:
                            self._take(message)
                        self._listen()
                finally:
                    self.broken = True  # the channel takes a moment to close, and the next text goes elsewhere
        except grpc.aio.AioRpcError as error:
            # A text sent while the source ends the stream fails locally with INTERNAL, and hides the real status.
            problem = error_of_call(error, self._where)
        except ServiceError as error:
            problem = error
        finally:
            self._end(problem)

    def _take(self, message: block_pb2.TokenBlock) -> None:
        """Hand a block to the text that has waited longest; one that belongs to another text breaks the stream."""
        if not self._waiting:
            raise UnavailableError(f"source {self._application} sent a block for no text")
        passage, answer = self._waiting[0]
        if message.text != passage.text:
            raise UnavailableError(f"source {self._application} answered for another text")
        self._waiting.popleft()
        if answer.done():
            return  # its caller has given up waiting
        try:
            answer.set_result(_decode(message, self._application))
        except ServiceError as error:
            answer.set_exception(error)

    def _listen(self) -> None:
        """Restart the timer of silence: the source has just sent something, or begins to owe an answer."""
        if self._silence is not None:
            self._silence.cancel()
        if self._timeout_seconds is not None and self._waiting and not self.broken:
            self._silence = asyncio.get_running_loop().call_later(self._timeout_seconds, self._fall_silent)

    def _fall_silent(self) -> None:
        self._end(DeadlineExceededError(f"{self._where} sent nothing for {self._timeout_seconds:g} s"))
        self._running.cancel()

    def _end(self, problem: ServiceError) -> None:
        self.broken = True
        if not self.landed.done():
            self.landed.set_result("")
        self._listen()
        while self._waiting:
            _, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(problem)

    async def _requests(self) -> AsyncIterator[source_pb2.StreamScoresRequest]:
        yield source_pb2.StreamScoresRequest(open=self._opening)
        while True:
            passages = [await self._outbox.get()]
            while not self._outbox.empty() and len(passages) < 64:
                passages.append(self._outbox.get_nowait())
            texts = source_pb2.ScoreTexts(texts=[p.text for p in passages], contexts=contexts_of(passages))
            yield source_pb2.StreamScoresRequest(texts=texts)
            yield source_pb2.StreamScoresRequest(credit=block_pb2.Credit(blocks=len(passages)))

    async def close(self) -> None:
        self._running.cancel()
        self._end(UnavailableError(f"{self._where}: the stream was closed"))
        await asyncio.gather(self._running, return_exceptions=True)
