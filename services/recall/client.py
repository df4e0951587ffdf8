"""Client of the recall service, used by the preparing of corpora and the command line."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc

from fusion.v1 import block_pb2, recall_pb2, recall_pb2_grpc
from services.base.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.base.retry import Backoff
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.ordered_stream import OrderedStream, StreamKind
from services.rpc.status import error_of_call

MAX_IN_FLIGHT = 16
"""Most texts that a stream may have under way."""
_RETRIED = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)


@dataclass(frozen=True, slots=True)
class LongText:
    """A text in UTF-8, and the question about it."""

    text: bytes
    question: str


class RecallClient:
    """A client of one recall service, on the running event loop."""

    def __init__(self, address: str, application: str = "recall", *, timeout_seconds: float = 600.0) -> None:
        self.address, self.application = address, application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = recall_pb2_grpc.RecallServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> recall_pb2.GetRecallInfoResponse:
        """Return the service's description; raises ServiceError: UnavailableError when it cannot be reached."""
        request = recall_pb2.GetRecallInfoRequest()
        response: recall_pb2.GetRecallInfoResponse = await self._call(
            self._stub.GetRecallInfo, request, timeout_seconds
        )
        return response

    async def select(
        self, documents: Sequence[LongText], settings: recall_pb2.RecallSettings | None = None
    ) -> list[recall_pb2.KeyBlocks]:
        """Return the key blocks of a few texts, in order; raises ServiceError."""
        request = recall_pb2.SelectKeyBlocksRequest(documents=map(_encoded, documents), settings=settings)
        response = await self._call(self._stub.SelectKeyBlocks, request, self._timeout_seconds)
        if len(response.found) != len(documents):
            raise UnavailableError(
                f"recall service {self.application} sent key blocks of {len(response.found)} texts for {len(documents)}"
            )
        for message, document in zip(response.found, documents, strict=True):
            _check(message, document, self.application)
        return list(response.found)

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        try:
            metadata = (*call_metadata(self.application), *timeout_metadata(timeout_seconds))
            return await method(request, metadata=metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"recall service {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class KeyBlockStream(OrderedStream[LongText, recall_pb2.KeyBlocks]):
    """A stream of texts to a recall service, and of their key blocks back.

    Args:
        settings: how blocks are selected.
        in_flight: texts under way at once, at most 16; others wait here.
        attempts: for one text, before its error is raised.
        timeout_seconds: a service that owes key blocks and sends none for so long breaks the stream.
    """

    def __init__(
        self,
        address: str,
        application: str = "recall",
        *,
        settings: recall_pb2.RecallSettings | None = None,
        in_flight: int = 8,
        attempts: int = 5,
        timeout_seconds: float | None = 600.0,
    ) -> None:
        super().__init__(address, application, _Found(application, settings), timeout_seconds=timeout_seconds)
        self._client = RecallClient(address, application, timeout_seconds=timeout_seconds or 600.0)
        self._settings, self._in_flight, self._attempts = settings, min(in_flight, MAX_IN_FLIGHT), attempts

    async def in_order(
        self, documents: Iterable[LongText]
    ) -> AsyncGenerator[recall_pb2.KeyBlocks | InvalidArgumentError, None]:
        """Yield the key blocks of every text, in order, or the error of one that the service refuses.

        A stream that breaks is opened anew and goes on with the first text that has no key blocks yet. Raises
        ServiceError when a text found no answer in all attempts.
        """
        running: deque[asyncio.Task[recall_pb2.KeyBlocks | InvalidArgumentError]] = deque()
        try:
            for document in documents:
                if len(running) == self._in_flight:
                    yield await running.popleft()
                running.append(asyncio.create_task(self._attempted(document)))
            while running:
                yield await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def close(self) -> None:
        await super().close()
        await self._client.close()

    async def _attempted(self, document: LongText) -> recall_pb2.KeyBlocks | InvalidArgumentError:
        """Return the key blocks of a text; its error where it is refused even alone: it broke no other one's stream."""
        backoff = Backoff(0.5)
        for _ in range(self._attempts - 1):
            try:
                return await self.ask(document)
            except InvalidArgumentError:
                break
            except _RETRIED:
                await asyncio.sleep(backoff.next_pause())
        for attempt in range(1, self._attempts + 1):
            try:
                [found] = await self._client.select([document], self._settings)
                return found
            except InvalidArgumentError as error:
                return error
            except _RETRIED:
                if attempt == self._attempts:
                    raise
                await asyncio.sleep(backoff.next_pause())
        raise AssertionError("the last attempt returns or raises")


class _Found(StreamKind[LongText, recall_pb2.KeyBlocks]):
    stub, method, service = recall_pb2_grpc.RecallServiceStub, "StreamKeyBlocks", "recall service"

    def __init__(self, application: str, settings: recall_pb2.RecallSettings | None) -> None:
        self._application, self._settings = application, settings

    def opening(self) -> recall_pb2.StreamKeyBlocksRequest:
        return recall_pb2.StreamKeyBlocksRequest(open=recall_pb2.StreamKeyBlocksOpen(settings=self._settings))

    def requests(self, items: Sequence[LongText]) -> Iterator[recall_pb2.StreamKeyBlocksRequest]:
        for item in items:  # one to a message, which could else be too large
            documents = recall_pb2.RecallDocuments(documents=[_encoded(item)])
            yield recall_pb2.StreamKeyBlocksRequest(documents=documents)
            yield recall_pb2.StreamKeyBlocksRequest(credit=block_pb2.Credit(blocks=1))

    def messages(self, frame: recall_pb2.StreamKeyBlocksResponse) -> Sequence[recall_pb2.KeyBlocks]:
        return frame.found

    def fits(self, message: recall_pb2.KeyBlocks, item: LongText, number: int) -> bool:
        return _is_of(message, item)

    def decode(self, message: recall_pb2.KeyBlocks, number: int) -> recall_pb2.KeyBlocks:
        return message


def _encoded(document: LongText) -> recall_pb2.RecallDocument:
    return recall_pb2.RecallDocument(text=document.text, question=document.question.encode(errors="replace"))


def _check(message: recall_pb2.KeyBlocks, document: LongText, application: str) -> None:
    if not _is_of(message, document):
        raise UnavailableError(f"recall service {application} sent blocks that are not of this text")


def _is_of(message: recall_pb2.KeyBlocks, document: LongText) -> bool:
    """Return whether the blocks lie in the text, in order and without overlap."""
    bounds = [0, *(bound for block in message.blocks for bound in (block.start_byte, block.end_byte))]
    bounds.append(len(document.text))
    return message.text_bytes == len(document.text) and all(before <= after for before, after in pairwise(bounds))
