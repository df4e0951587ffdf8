"""Where a stage runs: on the workers of Ray Train, or in this process."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from services.base.errors import ServiceError, UnavailableError
from services.posttrain.config import PosttrainConfig
from services.posttrain.job import StageJob

logger = logging.getLogger(__name__)

_FATAL_ERRORS = (ServiceError, ValueError, ArithmeticError)
"""Errors that would come again in another attempt of the same workers."""
Result = TypeVar("Result")


def run_stage(job: StageJob) -> None:
    """Train a stage to its end, from its newest whole checkpoint.

    Raises ServiceError or ValueError when something does not fit, ray.train.TrainingFailedError when workers failed
    more often than `max_failures`.
    """
    if job.config.num_workers == 0:
        train_here(job)
    else:
        _train_on_ray(job)


def run_apart(config: PosttrainConfig, work: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that needs a model, as a Ray task with the resources of a worker, or in this process."""
    if config.num_workers == 0:
        return work(*arguments)
    import ray

    use_gpu = _join_cluster(config)
    task: Any = ray.remote(num_cpus=config.cpus_per_worker, num_gpus=1 if use_gpu else 0)(work)
    try:
        found: Result = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, _FATAL_ERRORS):
            raise error.cause from error
        raise
    return found


def train_here(job: StageJob) -> None:
    """Train a stage in this process, which is one of the workers where there are several."""
    import torch

    torch.set_num_threads(job.config.threads)
    stage = importlib.import_module(f"services.posttrain.stages.{job.stage.kind}")
    stage.train(job)


def _train_on_ray(job: StageJob) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = job.config
    use_gpu = _join_cluster(config)
    state = job.folder / "ray"
    shutil.rmtree(state, ignore_errors=True)  # the checkpoints lie beside it: Ray's own list of them stays empty
    trainer = TorchTrainer(
        partial(_work, job),  # type: ignore[arg-type]  # type checkers see V1 here
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(state.absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    fatal: Exception | None = trainer.fit().return_value  # type: ignore[attr-defined]
    if fatal is not None:
        raise fatal


def _work(job: StageJob) -> Exception | None:
    """Run one worker; return an error that another attempt would meet again."""
    try:
        train_here(job)
    except _FATAL_ERRORS as error:
        if job.config.num_workers > 1:
            raise  # the others wait for this worker: only its end tells them
        return error
    return None


def _join_cluster(config: PosttrainConfig) -> bool:
    """Connect to Ray, or start one here; return whether workers get GPUs."""
    import ray

    if not ray.is_initialized():
        address = {key: os.environ[key] for key in ("RAY_ADDRESS",) if key in os.environ}
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": address})
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if there.get("CPU", 0) < config.cpus_per_worker:
        raise UnavailableError(
            f"posttrain: a worker needs {config.cpus_per_worker:g} CPU, the Ray cluster has {there.get('CPU', 0):g}"
        )
    if len(ray.nodes()) == 1:  # type: ignore[no-untyped-call]
        # With a single node there is nothing to preempt: skip Ray's watcher and its warning.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    has_gpu = there.get("GPU", 0) >= 1
    if config.device == "cuda" and not has_gpu:
        raise ValueError("posttrain.device: cuda is asked for, but the Ray cluster has no GPU; allowed here: auto, cpu")
    return has_gpu and config.device != "cpu"
