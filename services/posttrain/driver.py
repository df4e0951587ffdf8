"""Where a stage runs: on the workers of Ray Train, or in this process."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from services.jobs.cluster import join_cluster
from services.jobs.ray_workers import FATAL_ERRORS, run_workers
from services.posttrain.config import PosttrainConfig
from services.posttrain.job import StageJob

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def run_stage(job: StageJob) -> None:
    """Train a stage to its end, from its newest whole checkpoint.

    Raises ServiceError or ValueError when something does not fit, ray.train.TrainingFailedError when workers failed
    more often than `max_failures`.
    """
    if job.config.num_workers == 0:
        train_here(job)
        gc.collect()  # TRL's trainer and its model hold each other, and would stay beside the next stage's
    else:
        run_workers(partial(train_here, job), job.folder, job.config, use_gpu=_join(job.config))


def run_apart(config: PosttrainConfig, work: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that needs a model, as a Ray task with the resources of a worker, or in this process."""
    if config.num_workers == 0:
        return work(*arguments)
    import ray

    use_gpu = _join(config)
    task: Any = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=1 if use_gpu else 0)(work)
    try:
        found: Result = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FATAL_ERRORS):
            raise error.cause from error
        raise
    return found


def train_here(job: StageJob) -> None:
    """Train a stage in this process, which is one of the workers where there are several."""
    import torch

    torch.set_num_threads(job.config.threads)
    stage = importlib.import_module(f"services.posttrain.stages.{job.stage.kind}")
    stage.train(job)


def _join(config: PosttrainConfig) -> bool:
    return join_cluster("posttrain", device=config.device, cpus_per_worker=config.cpus_per_worker)
