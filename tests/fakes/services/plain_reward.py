"""A real reward service without Ray: the servicer on a plain gRPC server in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2_grpc

from fusion.v1 import reward_pb2_grpc
from services.reward.config import RewardServiceConfig
from services.reward.servicer import RewardServicer


@contextmanager
def plain_reward_service(config: RewardServiceConfig) -> Iterator[str]:
    """Serves as long as the block takes; gives the address."""
    ready, end, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    address: list[str] = []

    async def serve() -> None:
        servicer = RewardServicer.__new__(RewardServicer)
        await servicer.__init__(config)  # type: ignore[misc]
        server = grpc.aio.server()
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        health = health_pb2_grpc.HealthServicer()
        health.Check = servicer.Check
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        address.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await end.wait()
        await server.stop(None)
        await servicer.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(60)
