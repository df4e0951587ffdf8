"""grpc.health.v1 for a Serve deployment: the proxy routes `Check` to the application like any other method."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2

from services.common.errors import NotFoundError

SERVICER = "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"


def health_response(request: Any, service: str, problem: str | None) -> Any:
    """Answers a Check for `service` (or for the whole server): SERVING, or NOT_SERVING when there is a problem."""
    if request.service not in {"", service}:
        raise NotFoundError(f"service: {request.service} is not served here; known are {service} and the empty name")
    status = health_pb2.HealthCheckResponse
    return status(status=status.NOT_SERVING if problem else status.SERVING)
