"""A servicer on a plain gRPC server of this process, without Ray, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc


@dataclass
class Served:
    """A running servicer, its address, and the loop that it lives on."""

    servicer: Any
    address: str
    loop: asyncio.AbstractEventLoop


@contextmanager
def served(
    servicer_type: Any,
    add_to_server: Callable[..., Any],
    *arguments: Any,
    change: Callable[[Any], None] = lambda servicer: None,
    port: int = 0,
) -> Iterator[Served]:
    """Serve as long as the block takes, at a free port unless one is given.

    `arguments` are the servicer's; `change` is called with it before it serves. Its `Check` answers health checks.
    """
    ready, end, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    running = Served(servicer_type.__new__(servicer_type), "", loop)

    async def serve() -> None:
        await running.servicer.__init__(*arguments)
        change(running.servicer)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_to_server(running.servicer, server)
        health = health_pb2_grpc.HealthServicer()
        health.Check = running.servicer.Check
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        running.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        await server.start()
        ready.set()
        await end.wait()
        await server.stop(None)
        await running.servicer.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield running
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(60)
