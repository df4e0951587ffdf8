"""Back-pressure: a producer computes only what its consumer has granted, and packs it into frames.

Ray Serve's proxy reads a server stream as fast as the replica produces it, whatever the client does; credits keep
memory flat.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from services.base.errors import InvalidArgumentError, ResourceExhaustedError
from services.rpc.credits import Credits
from services.wire.protocol import FRAME_BYTES

Item = TypeVar("Item")
Result = TypeVar("Result")

_LINGER_SECONDS = 0.05
_LINGER_SHARE = 8
"""Inverse share of the results under way that a frame waits for, but not longer than the seconds above: a frame costs
Serve's proxy some milliseconds, whatever is in it, and a consumer with few credits must not be kept waiting."""


class Pipeline(Generic[Item, Result]):
    """Items computed concurrently, one credit each, and handed out in order, many to a frame.

    Args:
        items: the items to compute, in order.
        compute: from an item to its result; runs as a task of its own.
        size: bytes that a result takes on the wire.
        may_share: whether a result may travel in the same frame as the one before it.
        heartbeat_seconds: time without a frame after which an empty one goes out; by default none does.

    Attributes:
        stopped: whether `stop` ended it before all items were computed.
    """

    def __init__(
        self,
        items: AsyncIterator[Item],
        compute: Callable[[Item], Awaitable[Result]],
        size: Callable[[Result], int],
        may_share: Callable[[Result, Result], bool] = lambda before, after: True,
        heartbeat_seconds: float | None = None,
    ) -> None:
        self.credits = Credits()
        self.stopped = False
        self._heartbeat_seconds = heartbeat_seconds
        self._items = items
        self._compute = compute
        self._size = size
        self._may_share = may_share
        self._tasks: deque[asyncio.Future[Result]] = deque()
        self._arrived = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """The number of items that were begun and are in no frame yet."""
        return len(self._tasks)

    def stop(self) -> None:
        """Begin nothing more: the frames end when the items under way have been sent."""
        self.credits.close()

    async def frames(self, reader: Callable[[], Awaitable[None]]) -> AsyncGenerator[list[Result], None]:
        """Yield frames until the items end, or until nothing is left to send to a client that grants no more.

        `reader` grants the credits; it returns when the client has closed its side, and its failure ends the stream.
        """
        starting = asyncio.ensure_future(self._start_tasks())
        reading = asyncio.ensure_future(reader())
        try:
            while (more := await self._oldest_is_done(starting, reading)) is not False:
                if more is None:
                    yield []
                    continue
                enough = -(-len(self._tasks) // _LINGER_SHARE)
                until = asyncio.get_running_loop().time() + _LINGER_SECONDS
                frame = [self._tasks.popleft().result()]
                frame_bytes = self._size(frame[0])
                while frame_bytes < FRAME_BYTES:
                    if len(frame) < enough:
                        await self._next_is_done(until)
                    if not self._next_fits(frame[-1]):
                        break
                    frame.append(self._tasks.popleft().result())
                    frame_bytes += self._size(frame[-1])
                yield frame
        finally:
            left: list[asyncio.Future[Any]] = [starting, reading, *self._tasks]
            for future in left:
                future.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _start_tasks(self) -> None:
        async for item in self._items:
            if not await self.credits.take():
                self.stopped = True
                return
            self._tasks.append(asyncio.ensure_future(self._compute(item)))
            self._arrived.set()

    async def _oldest_is_done(self, starting: asyncio.Future[None], reading: asyncio.Future[None]) -> bool | None:
        """Wait for the oldest task. Return False when no more will come, None when it is time for a heartbeat.

        Raises the error that ended `starting` or `reading`.
        """
        while not (self._tasks and self._tasks[0].done()):
            for background in (starting, reading):
                if background.done():
                    background.result()
            if not self._tasks and (starting.done() or (reading.done() and self.credits.exhausted)):
                return False
            self._arrived.clear()
            arrival = asyncio.ensure_future(self._arrived.wait())
            try:
                running = [future for future in (starting, reading) if not future.done()]
                oldest = [self._tasks[0]] if self._tasks else [arrival]
                done, _ = await asyncio.wait(
                    [*oldest, *running], timeout=self._heartbeat_seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    return None
            finally:
                arrival.cancel()
        return True

    async def _next_is_done(self, until: float) -> None:
        """Wait for the oldest task, but only until that time of the event loop."""
        left = until - asyncio.get_running_loop().time()
        if left > 0 and not self._tasks[0].done():
            await asyncio.wait([self._tasks[0]], timeout=left)

    def _next_fits(self, before: Result) -> bool:
        if not (self._tasks and self._tasks[0].done()) or self._tasks[0].exception() is not None:
            return False
        return self._may_share(before, self._tasks[0].result())


class RequestPipeline(Pipeline[Item, Result]):
    """A pipeline of the items that a client sends on its stream, in messages beside those with credits.

    Args:
        requests: the messages after the first one.
        field: name of the messages with items, and of the repeated field that holds them there.
        items_of: from such a message, and the number of items before it, to its items; runs in a thread.
        compute, size: as in `Pipeline`.
        max_waiting: most items that wait for credits.
    """

    def __init__(
        self,
        requests: AsyncIterator[Any],
        field: str,
        items_of: Callable[[Any, int], Sequence[Item]],
        compute: Callable[[Item], Awaitable[Result]],
        size: Callable[[Result], int],
        *,
        max_waiting: int,
    ) -> None:
        self._waiting: asyncio.Queue[Item | None] = asyncio.Queue()  # `_read` bounds it
        super().__init__(_until_none(self._waiting), compute, size)
        self._requests, self._field, self._items_of = requests, field, items_of
        self._max_waiting = max_waiting

    def answers(self) -> AsyncGenerator[list[Result], None]:
        """Yield frames of results until the client has sent its last item, or grants no more for those it sent.

        Raises InvalidArgumentError for a message that is neither items nor credit, ResourceExhaustedError for more
        items than may wait, and whatever `items_of` and `compute` raise.
        """
        return self.frames(self._read)

    async def _read(self) -> None:
        num_read, field = 0, self._field
        async for message in self._requests:
            kind = message.WhichOneof("message")
            if kind == "credit":
                self.credits.grant(message.credit.blocks)
            elif kind == field:
                given = getattr(message, field)
                num_given = len(getattr(given, field))
                if self._waiting.qsize() + num_given > self._max_waiting:
                    raise ResourceExhaustedError(f"{field}: at most {self._max_waiting} may wait for credits")
                for item in await asyncio.to_thread(self._items_of, given, num_read):
                    self._waiting.put_nowait(item)
                num_read += num_given
            else:
                raise InvalidArgumentError(f"message: expected {field} or credit, got {kind or 'nothing'}")
        self._waiting.put_nowait(None)


async def opening_of(requests: AsyncIterator[Any]) -> Any:
    """Return the `open` in the first message of a stream; raises InvalidArgumentError where that is another one."""
    first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != "open":
        raise InvalidArgumentError("message: a stream starts with `open`")
    return first.open


async def _until_none(queue: asyncio.Queue[Item | None]) -> AsyncIterator[Item]:
    """Yield what is put into a queue, up to the first None."""
    while (item := await queue.get()) is not None:
        yield item
