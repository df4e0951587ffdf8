"""The client's side of an ordered stream: items out with the credits for their answers, answers back in order."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import grpc

from services.base.errors import DeadlineExceededError, ServiceError, UnavailableError
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.status import error_of_call

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

_ITEMS_AT_ONCE = 64


class StreamKind(ABC, Generic[Asked, Answered]):
    """The messages of one streaming method.

    Attributes:
        stub: the stub's class, made from a channel.
        method: name of the method.
        service: the kind of service, for messages.
    """

    stub: ClassVar[Callable[[Any], Any]]
    method: ClassVar[str]
    service: ClassVar[str]

    @abstractmethod
    def opening(self) -> Any:
        """Return the first request."""

    @abstractmethod
    def requests(self, items: Sequence[Asked]) -> Iterable[Any]:
        """Return the requests that send items, and the credits for their answers."""

    @abstractmethod
    def messages(self, frame: Any) -> Sequence[Any]:
        """Return the answers in a frame, one for each item."""

    @abstractmethod
    def fits(self, message: Any, item: Asked, number: int) -> bool:
        """Return whether an answer is for this item, the one with this number on the connection."""

    @abstractmethod
    def decode(self, message: Any, number: int) -> Answered:
        """Return the answer of a message; raises ServiceError for a broken one, which fails its own item only."""


class OrderedStream(Generic[Asked, Answered]):
    """One stream of items to a service and of answers back, in order, opened when the first item is sent.

    Every item is sent with the credit for its answer, so no more answers are under way than items were submitted.
    When the stream breaks, every waiting item fails and the next one opens a new stream. A service that owes answers
    and sends none for `timeout_seconds` breaks it, too: with DeadlineExceededError, however many items wait.
    """

    def __init__(
        self,
        address: str,
        application: str,
        kind: StreamKind[Asked, Answered],
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        self._address = address
        self._application = application
        self._kind = kind
        self._timeout_seconds = timeout_seconds
        self._connection: _Connection[Asked, Answered] | None = None

    @property
    def broken(self) -> bool:
        """True when the stream has ended since it was last opened."""
        return self._connection is not None and self._connection.broken

    @property
    def replica(self) -> str:
        """The name of the replica that serves the stream; empty as long as it has not said it."""
        connection = self._connection
        return connection.landed.result() if connection is not None and connection.landed.done() else ""

    async def landed(self) -> str:
        """Wait for the name of the replica; empty when the stream ends without it. Opens the stream."""
        return await asyncio.shield(self._opened().landed)

    async def ask(self, item: Asked) -> Answered:
        """Return the answer for an item; raises ServiceError when the stream broke before it."""
        return await self._opened().ask(item)

    def _opened(self) -> _Connection[Asked, Answered]:
        if self._connection is None or self._connection.broken:
            self._connection = _Connection(self._address, self._application, self._kind, self._timeout_seconds)
        return self._connection

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


class _Connection(Generic[Asked, Answered]):
    """One connection of a stream, until it breaks. It answers the items sent on it, and no others."""

    def __init__(
        self, address: str, application: str, kind: StreamKind[Asked, Answered], timeout_seconds: float | None
    ) -> None:
        self.broken = False
        self._where = f"{kind.service} {application} at {address}"
        self._who = f"{kind.service} {application}"
        self._application = application
        self._kind = kind
        self._timeout_seconds = timeout_seconds
        self.landed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting: deque[tuple[Asked, asyncio.Future[Answered]]] = deque()
        self._num_answered = 0
        self._outbox: asyncio.Queue[Asked] = asyncio.Queue()
        self._silence: asyncio.TimerHandle | None = None
        self._running = asyncio.create_task(self._run(address))

    async def ask(self, item: Asked) -> Answered:
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if len(self._waiting) == 1:
            self._listen()
        self._outbox.put_nowait(item)
        return await answer

    async def _run(self, address: str) -> None:
        problem: ServiceError = UnavailableError(f"{self._where} ended the stream")
        try:
            async with open_aio_channel(address) as channel:
                method = getattr(type(self._kind).stub(channel), self._kind.method)
                try:
                    async for frame in method(self._requests(), metadata=call_metadata(self._application)):
                        if not self.landed.done():
                            self.landed.set_result(frame.replica)
                        for message in self._kind.messages(frame):
                            self._take(message)
                        self._listen()
                finally:
                    self.broken = True  # the channel takes a moment to close, and the next item goes elsewhere
        except grpc.aio.AioRpcError as error:
            # An item sent while the service ends the stream fails locally with INTERNAL, and hides the real status.
            problem = error_of_call(error, self._where)
        except ServiceError as error:
            problem = error
        finally:
            self._end(problem)

    def _take(self, message: Any) -> None:
        """Hand an answer to the item that has waited longest; one that belongs to another item breaks the stream."""
        if not self._waiting:
            raise UnavailableError(f"{self._who} sent an answer for nothing")
        item, answer = self._waiting[0]
        number = self._num_answered
        if not self._kind.fits(message, item, number):
            raise UnavailableError(f"{self._who} answered for another one")
        self._waiting.popleft()
        self._num_answered += 1
        if answer.done():
            return  # its caller has given up waiting
        try:
            answer.set_result(self._kind.decode(message, number))
        except ServiceError as error:
            answer.set_exception(error)

    def _listen(self) -> None:
        """Restart the timer of silence: the service has just sent something, or begins to owe an answer."""
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

    async def _requests(self) -> AsyncIterator[Any]:
        yield self._kind.opening()
        while True:
            items = [await self._outbox.get()]
            while not self._outbox.empty() and len(items) < _ITEMS_AT_ONCE:
                items.append(self._outbox.get_nowait())
            for request in self._kind.requests(items):
                yield request

    async def close(self) -> None:
        self._running.cancel()
        self._end(UnavailableError(f"{self._where}: the stream was closed"))
        await asyncio.gather(self._running, return_exceptions=True)
