"""A replica that Serve has told to stop ends its streams, so that their clients go on at another one.

Serve waits for the calls under way, sends no new ones and then kills the replica; a stream of weeks would just be cut
off. Serve has no hook for the beginning of this, so this module reads the flag of Serve's own replica. Where a new Ray
has moved it, the log says so, and streams are cut off: clients resume from their cursors in either case.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from services.base.errors import UnavailableError
from services.rpc.pipeline import Pipeline

logger = logging.getLogger("ray.serve")

_LOOK_SECONDS = 0.2


class Draining:
    """The streams of one replica. Made on the event loop that serves them.

    Args:
        flush: writes data that the replica holds only in memory. Called when the replica is told to stop, and again
            when its last stream has ended: Serve may kill it before that.
    """

    def __init__(self, flush: Callable[[], Awaitable[None]] | None = None) -> None:
        self._flush = flush
        self._begun = False
        self._pipelines: set[Pipeline[Any, Any]] = set()
        self._ended = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch(_flag()))

    @property
    def streams(self) -> int:
        return len(self._pipelines)

    @property
    def in_flight(self) -> int:
        """The number of items under way on all streams."""
        return sum(pipeline.in_flight for pipeline in self._pipelines)

    def begin(self) -> None:
        """Stop all streams: each begins no more windows, and ends when those under way have been sent."""
        if self._begun:
            return
        self._begun = True
        for pipeline in self._pipelines:
            pipeline.stop()
        self._look_for_end()
        self._stopping = asyncio.create_task(self._stop())

    @asynccontextmanager
    async def holding(self, pipeline: Pipeline[Any, Any]) -> AsyncIterator[None]:
        """Count a stream while it lasts.

        Raises UnavailableError at its start when the replica is being stopped already, and at its end when it was
        stopped under way.
        """
        if self._begun:
            raise UnavailableError("draining: this replica is being stopped")
        self._pipelines.add(pipeline)
        try:
            yield
        finally:
            self._pipelines.discard(pipeline)
            self._look_for_end()
        if pipeline.stopped:
            raise UnavailableError("draining: this replica is being stopped; the stream goes on at another one")

    async def close(self) -> None:
        """End the watch, and wait until `flush` has written everything."""
        self._watching.cancel()
        await asyncio.gather(self._watching, *([self._stopping] if self._stopping else []), return_exceptions=True)

    async def _watch(self, told_to_stop: Callable[[], bool]) -> None:
        while not told_to_stop():
            await asyncio.sleep(_LOOK_SECONDS)
        logger.info("told to stop: %d streams end after their windows under way", len(self._pipelines))
        self.begin()

    async def _stop(self) -> None:
        if self._flush is not None:
            await self._flush()
            await self._ended.wait()
            await self._flush()

    def _look_for_end(self) -> None:
        if self._begun and not self._pipelines:
            self._ended.set()


def replica_name() -> str:
    """Return a name that no other replica has: Serve's own for it, or, without Serve, one of this process."""
    with contextlib.suppress(RayServeException):
        return str(serve.get_replica_context().replica_id.unique_id)
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _flag() -> Callable[[], bool]:
    """Return a function that is true once Serve has told the replica in this process to stop."""
    if not ray.is_initialized():
        return lambda: False
    with contextlib.suppress(AttributeError, StopIteration):
        replica = next(iter(ray._private.worker.global_worker.actors.values()))._replica_impl
        if isinstance(replica._shutting_down, bool):
            return lambda: bool(replica._shutting_down)
    logger.warning("ray %s: cannot see when a replica is told to stop; its streams will be cut off", ray.__version__)
    return lambda: False
