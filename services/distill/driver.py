"""The Ray Train job: the driver checks all that can be known beforehand, then the workers run `DistillWorker`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from services.base.atomic import sweep_partial
from services.base.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from services.base.files import open_location
from services.distill.config import DistillConfig
from services.distill.data.feed import FusionStream
from services.distill.job import DistillJob
from services.distill.plan import RunPlan, claim_run, make_plan
from services.fusion.client import FusionClient
from services.jobs.cluster import connect, skip_preemption_watcher
from services.jobs.lease import held_leases
from services.jobs.storage import STORAGE_KEY, StoredCheckpoint, check_writable, mend_snapshot
from services.jobs.tracking import Trackers

logger = logging.getLogger(__name__)

_FATAL_ERRORS = (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    ValueError,
    ArithmeticError,
)
"""Errors that would come again in another attempt of the same workers."""

OpenClient = Callable[[DistillJob], FusionStream]


def open_client(job: DistillJob) -> FusionStream:
    """Return the client that streams over gRPC."""
    return FusionClient(job.fusion_address, application=job.application, token=job.token)


def run(job: DistillJob, *, start_over: bool = False, open_client: OpenClient = open_client) -> None:
    """Train until the end, going on from the newest checkpoint of the run; the model is in `job.files.model` then.

    Args:
        job: the run.
        start_over: forget checkpoints and logs of the same run folder.
        open_client: opens the stream, here and in every worker.

    Raises FailedPreconditionError while another process trains the run; ServiceError or ValueError when something does
    not fit, most of it before any worker starts; ArithmeticError when training diverges; ray.train.TrainingFailedError
    when workers failed more often than `max_failures`.
    """
    job.tracking.check()
    plan = make_plan(job, open_client(job))
    check_writable(job.checkpoints)
    with held_leases(job.lease_locations, job.run_name):
        sweep_partial(job.run_folder)
        if not start_over:
            claim_run(job, plan)
        use_gpu = _join_cluster(job.config)
        if start_over:
            # Only after all checks: a run that is refused deletes no checkpoint.
            job.start_over()
            claim_run(job, plan)
        _train(job, plan, open_client, use_gpu=use_gpu)


def _join_cluster(config: DistillConfig) -> bool:
    """Connect to Ray and check that the run fits; return whether workers get GPUs."""
    cluster = connect()
    use_gpu = _use_gpu(config.device, cluster)
    placeable = _check_resources(_per_worker(config, use_gpu=use_gpu), config.worker_range[0], cluster)
    if placeable:
        skip_preemption_watcher()
    return use_gpu


def _train(job: DistillJob, plan: RunPlan, open_client: OpenClient, *, use_gpu: bool) -> None:
    """Run the workers to their end; raises an error that another attempt would meet again."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = job.config
    fallback = mend_snapshot(job.checkpoints)
    files, checkpoints = open_location(job.checkpoints, STORAGE_KEY)
    storage, _, name = checkpoints.rpartition("/")
    # The job travels in the function, because it may hold a token: Ray shows train_loop_config on its dashboard.
    trainer = TorchTrainer(
        partial(work, job, plan, open_client, fallback),  # type: ignore[arg-type]  # type checkers see V1 here
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # V2 takes a range
            use_gpu=use_gpu,
            resources_per_worker=_per_worker(config, use_gpu=use_gpu),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=storage,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    fatal: Exception | None = trainer.fit().return_value  # type: ignore[attr-defined]
    if fatal is not None:
        raise fatal


def work(
    job: DistillJob, plan: RunPlan, open_client: OpenClient, fallback: StoredCheckpoint | None
) -> Exception | None:
    """Run one worker; return an error that another attempt would meet again, None after the last step."""
    import ray.train
    import ray.train.torch
    import torch

    from services.distill.workers.parallel import parallelise
    from services.distill.workers.worker import DistillWorker
    from services.distill.workers.world import World
    from services.jobs.observer import curves_of, observer

    _quieten_reports()
    torch.set_num_threads(job.config.threads)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
    )
    if world.size > 1:
        world = replace(world, parallel=partial(parallelise, kind=job.config.parallel, device=device))

    def keep_checkpoint(metrics: dict[str, Any], folder: Path, step: int) -> None:
        # Ray puts the files of all workers into one folder, and lists it once all are there.
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")

    checkpoint = ray.train.get_checkpoint()
    try:
        with contextlib.ExitStack() as stack:
            restore_from = None
            if checkpoint is not None:
                restore_from = Path(stack.enter_context(checkpoint.as_directory()))
            elif fallback is not None:
                restore_from = stack.enter_context(fallback.local())
            worker = DistillWorker(
                job,
                plan,
                open_client(job),
                world,
                restore_from=restore_from,
                keep_checkpoint=keep_checkpoint,
            )
        if world.rank != 0:
            worker.run()
            return None
        step = worker.position.step
        with Trackers(job.tracking, job.run_name, job.files, after_step=step, figures=curves_of) as trackers:
            worker.run(observer(job.run_name), trackers.write)
    except _FATAL_ERRORS as error:
        if world.size > 1:
            raise  # the others wait for this worker: only its end tells them
        return error
    return None


def _quieten_reports() -> None:
    """Drop the line that Ray Train logs for every report, on every worker."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not str(record.msg).startswith("Reporting training result"))


def _per_worker(config: DistillConfig, *, use_gpu: bool) -> dict[str, float]:
    """Return the resources that Ray reserves for a worker."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})


def _use_gpu(device: str, cluster: dict[str, float]) -> bool:
    has_gpu = cluster.get("GPU", 0) >= 1
    if device == "cuda" and not has_gpu:
        raise ValueError("distill.device: cuda is asked for, but the Ray cluster has no GPU; allowed here: auto, cpu")
    return has_gpu and device != "cpu"


def _check_resources(per_worker: dict[str, float], num_workers: int, cluster: dict[str, float]) -> bool:
    """Return whether all workers fit now; raise UnavailableError unless one of them does.

    A job that can never be placed would wait for ever, so one worker must fit; for more of them an autoscaling cluster
    may still grow.
    """
    placeable = True
    for name, amount in per_worker.items():
        there = cluster.get(name, 0)
        if amount > there:
            raise UnavailableError(f"distill: a worker needs {amount:g} {name}, the Ray cluster has {there:g}")
        if amount * num_workers > there:
            logger.warning("%d workers need %g %s, the cluster has %g", num_workers, amount * num_workers, name, there)
            placeable = False
    return placeable
