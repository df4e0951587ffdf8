"""The Serve application of the recall service: `import_path: services.recall.app:build`, section `recall` as `args`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from services.recall.config import RecallConfig
from services.recall.servicer import RecallServicer

SERVICER = "fusion.v1.recall_pb2_grpc.add_RecallServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    config = RecallConfig.model_validate(args)
    deployment = serve.deployment(
        name="recall",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        health_check_period_s=2,  # Serve replaces a replica after three failures in a row
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=20,
    )(RecallServicer)
    application: Application = deployment.bind(config)
    return application
