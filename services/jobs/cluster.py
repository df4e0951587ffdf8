"""The Ray cluster that a job's driver runs its workers on."""

from __future__ import annotations

import logging
import os

from services.base.errors import UnavailableError


def connect() -> dict[str, float]:
    """Connect to Ray, or start one here; return the cluster's resources."""
    import ray

    if not ray.is_initialized():
        # Ray, and Ray Train's helpers, would take the newest cluster on this machine, whoever started it.
        address = {key: os.environ[key] for key in ("RAY_ADDRESS",) if key in os.environ}
        ray.init(
            address.get("RAY_ADDRESS", "local"),
            log_to_driver=True,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": address},
        )
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return there


def skip_preemption_watcher() -> None:
    """Do without Ray Train's watcher, and its warning, where a single node leaves nothing to preempt."""
    import ray

    if len(ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def join_cluster(section: str, *, device: str, cpus_per_worker: float) -> bool:
    """Connect to Ray, or start one here; return whether workers get GPUs.

    Raises UnavailableError naming the recipe's `section` when no worker fits, ValueError for a device that is missing.
    """
    there = connect()
    if there.get("CPU", 0) < cpus_per_worker:
        raise UnavailableError(
            f"{section}: a worker needs {cpus_per_worker:g} CPU, the Ray cluster has {there.get('CPU', 0):g}"
        )
    skip_preemption_watcher()
    has_gpu = there.get("GPU", 0) >= 1
    if device == "cuda" and not has_gpu:
        raise ValueError(f"{section}.device: cuda is asked for, but the Ray cluster has no GPU; allowed: auto, cpu")
    return has_gpu and device != "cpu"
