"""Build the Serve application of one source: `import_path: services.source.app:build`, the source's keys as `args`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from services.source.config import SourceConfig
from services.source.servicer import SourceServicer

SERVICER = "fusion.v1.source_pb2_grpc.add_SourceServiceServicer_to_server"


def build(args: dict[str, Any]) -> Application:
    """Return the application for the `args` of a Serve config; raises ValidationError naming the key that is wrong."""
    config = SourceConfig.model_validate(args)
    application: Application = serve.deployment(**deployment_options(config))(SourceServicer).bind(config)
    return application


def deployment_options(config: SourceConfig) -> dict[str, Any]:
    """Return the options of `serve.deployment`: number and place of replicas, limits, and times of health checks."""
    options: dict[str, Any] = {
        "name": "source",
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "health_check_period_s": 2,  # Serve wants three failures in a row before it replaces a replica
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 20,
    }
    if config.autoscaling is None:
        options["num_replicas"] = config.num_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": config.autoscaling.min_replicas,
            "max_replicas": config.autoscaling.max_replicas,
            "initial_replicas": max(1, config.autoscaling.min_replicas),
            "target_ongoing_requests": config.autoscaling.target_ongoing_requests,
            "upscale_delay_s": config.autoscaling.upscale_delay_seconds,
            "downscale_delay_s": config.autoscaling.downscale_delay_seconds,
        }
    if config.places_workers:
        # vLLM's Ray executor puts a worker on each GPU bundle of the replica's own placement group; the replica itself
        # holds no GPU and lives in the first bundle.
        bundles: list[dict[str, float]] = [{"GPU": 1} for _ in range(config.num_workers)]
        bundles[0]["CPU"] = config.num_cpus
        options["placement_group_bundles"] = bundles
        options["placement_group_strategy"] = config.placement_strategy
        options["ray_actor_options"] = {"num_cpus": config.num_cpus}
    else:
        options["ray_actor_options"] = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
    return options
