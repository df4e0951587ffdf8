"""A source service that is silent for a long time before it answers: `quiet_source:build` of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray import serve
from ray.serve import Application

from fusion.v1 import source_pb2


class QuietSource:
    """Answers every call with an empty message, `quiet_seconds` after it came."""

    def __init__(self, quiet_seconds: float) -> None:
        self._quiet_seconds = quiet_seconds

    async def Score(self, request: source_pb2.ScoreRequest) -> source_pb2.ScoreResponse:  # noqa: N802  # gRPC's name
        await asyncio.sleep(self._quiet_seconds)
        return source_pb2.ScoreResponse()

    async def StreamScores(  # noqa: N802  # gRPC's name
        self, requests: AsyncIterator[source_pb2.StreamScoresRequest]
    ) -> AsyncGenerator[source_pb2.StreamScoresResponse, None]:
        await anext(requests)
        await asyncio.sleep(self._quiet_seconds)
        yield source_pb2.StreamScoresResponse()


def build(args: dict[str, Any]) -> Application:
    """The application for the `args` of a Serve config."""
    application: Application = serve.deployment(name="quiet", ray_actor_options={"num_cpus": 0})(QuietSource).bind(
        args["quiet_seconds"]
    )
    return application
