"""The Serve application of a service that is deployed beside sources and fusion service."""

from __future__ import annotations

from typing import Any, Protocol

from ray import serve
from ray.serve import Application


class ReplicaSettings(Protocol):
    """The settings of a section that say how its replicas run."""

    @property
    def num_replicas(self) -> int: ...

    @property
    def num_cpus(self) -> float: ...

    @property
    def max_ongoing_requests(self) -> int: ...

    @property
    def max_queued_requests(self) -> int: ...


def application_of(name: str, servicer: Any, config: ReplicaSettings, *, num_gpus: float = 0) -> Application:
    """Return the application of a servicer, whose one argument is its configuration; `name` is the deployment's."""
    deployment = serve.deployment(
        name=name,
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": num_gpus},
        health_check_period_s=2,  # Serve replaces a replica after three failures in a row
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=20,
    )(servicer)
    application: Application = deployment.bind(config)
    return application
