"""A fusion service that sends without being asked, to see what the gateway does with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc


class Firehose(fusion_pb2_grpc.FusionServiceServicer, health_pb2_grpc.HealthServicer):
    """Sends frames of 1 MiB as fast as they are taken, whatever was granted."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent = 0

    def StreamFused(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        frame = fusion_pb2.StreamFusedResponse(blocks=[block_pb2.TokenBlock(text=bytes(2**20))])
        for _ in range(400):
            self.sent += 1
            yield frame

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
