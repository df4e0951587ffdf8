"""The Serve application of the fusion service: `import_path: services.fusion.app:build`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from services.fusion.config import FusionServiceConfig
from services.fusion.servicer import FusionServicer

SERVICER = "fusion.v1.fusion_pb2_grpc.add_FusionServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config."""
    config = FusionServiceConfig.model_validate(args)
    service = config.service
    deployment = serve.deployment(
        name="fusion",
        num_replicas=service.num_replicas,
        max_ongoing_requests=service.max_ongoing_requests,
        max_queued_requests=service.max_queued_requests,
        ray_actor_options={"num_cpus": service.num_cpus},
        health_check_period_s=2,  # Serve replaces a replica after three failures in a row
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=20,
    )(FusionServicer)
    application: Application = deployment.bind(config)
    return application
