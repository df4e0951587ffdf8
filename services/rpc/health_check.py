"""Ask a server for its health with the standard gRPC health check."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc.auth import call_metadata
from services.rpc.channel import open_channel

_TIMEOUT_SECONDS = 15.0


def health_of(address: str, application: str) -> str:
    """Return the answer of the standard gRPC health check, or the status code when there is none."""
    with open_channel(address) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), metadata=call_metadata(application), timeout=_TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
