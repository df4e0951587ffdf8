"""Calls that are quiet for minutes, through Serve's own proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusion.v1 import source_pb2, source_pb2_grpc
from services.deploy.local_ray import free_port
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.source.app import SERVICER
from tests.fakes.services.local_serve import local_serve

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

QUIET_SECONDS = 560


def test_a_call_and_a_stream_that_are_quiet_for_minutes_end_well(home: Path) -> None:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "grpc_options": {"port": port, "grpc_servicer_functions": [SERVICER]},
        "applications": [
            {
                "name": "quiet",
                "route_prefix": "/quiet",
                "import_path": "tests.fakes.services.quiet_source:build",
                "args": {"quiet_seconds": QUIET_SECONDS},
            }
        ],
    }

    async def opening(done: asyncio.Event) -> AsyncIterator[source_pb2.StreamScoresRequest]:
        yield source_pb2.StreamScoresRequest(open=source_pb2.StreamScoresOpen())
        await done.wait()

    async def call() -> source_pb2.ScoreResponse:
        async with open_aio_channel(f"127.0.0.1:{port}") as channel:
            stub = source_pb2_grpc.SourceServiceStub(channel)
            response: source_pb2.ScoreResponse = await stub.Score(
                source_pb2.ScoreRequest(), metadata=call_metadata("quiet"), timeout=QUIET_SECONDS + 60
            )
            return response

    async def stream() -> list[source_pb2.StreamScoresResponse]:
        done = asyncio.Event()
        async with open_aio_channel(f"127.0.0.1:{port}") as channel:
            stub = source_pb2_grpc.SourceServiceStub(channel)
            responses = stub.StreamScores(opening(done), metadata=call_metadata("quiet"), timeout=QUIET_SECONDS + 60)
            found = [await anext(aiter(responses))]
            done.set()
            return found

    async def both() -> None:
        called, streamed = await asyncio.gather(call(), stream())
        assert called == source_pb2.ScoreResponse()
        assert streamed == [source_pb2.StreamScoresResponse()]

    with local_serve(config):
        asyncio.run(both())
