"""The Serve application of the reward model: `import_path: services.reward.app:build`, `reward.serve` as `args`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from services.reward.config import RewardServiceConfig
from services.reward.servicer import RewardServicer

SERVICER = "fusion.v1.reward_pb2_grpc.add_RewardServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    config = RewardServiceConfig.model_validate(args)
    deployment = serve.deployment(
        name="reward",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        health_check_period_s=2,  # Serve replaces a replica after three failures in a row
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=20,
    )(RewardServicer)
    application: Application = deployment.bind(config)
    return application
