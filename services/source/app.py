"""Builds the Serve application of one source: `import_path: services.source.app:build`, the source's keys as `args`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from services.source.config import SourceConfig
from services.source.servicer import SourceServicer

SERVICER = "fusion.v1.source_pb2_grpc.add_SourceServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """The application for a source that has no address of its own."""
    config = SourceConfig.model_validate(args)
    deployment = serve.deployment(
        name="source",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=20,
    )(SourceServicer)
    application: Application = deployment.bind(config)
    return application
