"""A real source without Ray: the servicer on a plain gRPC server in this process, counting what it is asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from fusion.v1 import source_pb2_grpc
from services.source.config import SourceConfig
from services.source.servicer import SourceServicer


class PlainSource:
    """Where it listens, and how many windows it has scored. `hold_after` windows it answers nothing more."""

    def __init__(self) -> None:
        self.address = ""
        self.scored = 0
        self.hold_after: int | None = None
        self.on_hold = threading.Event()

    def wrap(self, score: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any) -> Any:
            while self.hold_after is not None and self.scored >= self.hold_after:
                self.on_hold.set()
                await asyncio.sleep(0.01)
            self.scored += 1
            return await score(*args)

        return counted


@contextmanager
def plain_source(config: SourceConfig) -> Iterator[PlainSource]:
    source, ready, end = PlainSource(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        servicer = SourceServicer.__new__(SourceServicer)
        await servicer.__init__(config)  # type: ignore[misc]
        servicer._scorer.score = source.wrap(servicer._scorer.score)  # type: ignore[method-assign]
        server = grpc.aio.server()
        source_pb2_grpc.add_SourceServiceServicer_to_server(servicer, server)
        source.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        ready.set()
        await end.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield source
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
