"""grpc.health.v1 for a Serve deployment: the proxy routes `Check` to the application like any other method.

The empty service name and the service's own ask whether it can do its work (readiness): a fusion service without enough
sources cannot. The name `liveness` asks only whether the replica answers at all: a probe that restarts dead containers
must not restart a fusion service because sources are away.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from grpc_health.v1 import health_pb2

from services.base.errors import NotFoundError

SERVICER = "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"


LIVENESS = "liveness"


async def health_response(request: Any, service: str, find_problem: Callable[[], Awaitable[str | None]]) -> Any:
    """Answer a Check for `service` (or for the whole server): SERVING, or NOT_SERVING when there is a problem.

    Raises NotFoundError for a name that is not known.
    """
    status = health_pb2.HealthCheckResponse
    if request.service == LIVENESS:
        return status(status=status.SERVING)
    if request.service not in {"", service}:
        raise NotFoundError(
            f"service: {request.service} is not served here; known are {service}, {LIVENESS} and the empty name"
        )
    return status(status=status.NOT_SERVING if await find_problem() else status.SERVING)
