"""The Ray Train job: the driver checks everything that can be known beforehand, then workers run `Trainer`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from services.common.errors import UnavailableError
from services.distill.checkpoint import newest_complete
from services.distill.feed import FusionStream
from services.distill.job import DistillJob
from services.distill.plan import RunPlan, make_plan
from services.distill.record import claim_run_folder
from services.fusion.client import FusionClient

logger = logging.getLogger(__name__)

OpenClient = Callable[[DistillJob], FusionStream]


def open_client(job: DistillJob) -> FusionStream:
    """The stream over gRPC."""
    return FusionClient(job.fusion_address, application=job.application, token=job.token)


def run(job: DistillJob, *, start_over: bool = False, open_client: OpenClient = open_client) -> None:
    """Trains until the end, going on from the newest checkpoint of the run; the model is in `job.files.model` then.

    Args:
        job: the run.
        start_over: forget checkpoints and logs of the same run folder.
        open_client: opens the stream, here and in every worker.

    Raises ServiceError or ValueError before any worker starts when something does not fit, and
    ray.train.TrainingFailedError when the workers failed more often than `max_failures`.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if start_over:
        job.files.clear()
    plan = make_plan(job, open_client(job))
    claim_run_folder(job, plan)
    fallback = _mend_snapshot(job)
    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    config = job.config
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    use_gpu = _use_gpu(config.device, cluster)
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    _check_resources(resources, config.num_workers, cluster)
    # The job travels in the function, not in train_loop_config, which Ray shows on its dashboard: it may hold a token.
    TorchTrainer(
        partial(_work, job, plan, open_client, fallback),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[call-arg]  # type checkers see Ray Train V1 here
            name=job.files.checkpoints.name,
            storage_path=str(job.run_folder.absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    ).fit()


def _work(job: DistillJob, plan: RunPlan, open_client: OpenClient, fallback: Path | None) -> None:
    """What every worker does."""
    import ray.train
    import ray.train.torch
    import torch

    from services.distill.trainer import Trainer
    from services.distill.world import World

    torch.set_num_threads(job.config.threads)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        parallel=partial(ray.train.torch.prepare_model, move_to_device=device),
    )

    def report(metrics: dict[str, Any], folder: Path | None, step: int) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")

    def trainer(folder: str | Path | None) -> Trainer:
        restore_from = Path(folder) if folder else None
        return Trainer(job, plan, open_client(job), world, restore_from=restore_from, report=report)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        ready = trainer(fallback)
    else:
        with checkpoint.as_directory() as folder:
            ready = trainer(folder)
    ready.run()


def _use_gpu(device: str, cluster: dict[str, float]) -> bool:
    has_gpu = cluster.get("GPU", 0) >= 1
    if device == "cuda" and not has_gpu:
        raise ValueError("distill.device: cuda is asked for, but the Ray cluster has no GPU; allowed here: auto, cpu")
    return has_gpu and device != "cpu"


def _check_resources(per_worker: dict[str, float], num_workers: int, cluster: dict[str, float]) -> None:
    """A job that can never be placed would wait for ever; an autoscaling cluster may still grow, hence only a warning
    for more than one worker."""
    for name, amount in per_worker.items():
        there = cluster.get(name, 0)
        if amount > there:
            raise UnavailableError(f"distill: a worker needs {amount:g} {name}, the Ray cluster has {there:g}")
        if amount * num_workers > there:
            logger.warning("%d workers need %g %s, the cluster has %g", num_workers, amount * num_workers, name, there)


def _mend_snapshot(job: DistillJob) -> Path | None:
    """Ray Train writes its list of checkpoints in place; a kill in that moment leaves it unreadable, and Ray then
    refuses to start. The list is set aside, and the newest complete checkpoint is returned to go on from."""
    snapshot = job.files.checkpoints / "checkpoint_manager_snapshot.json"
    try:
        listed = json.loads(snapshot.read_text(encoding="utf-8"))["checkpoint_results"]
        names = [entry["checkpoint_dir_name"] for entry in listed]
    except FileNotFoundError:
        return newest_complete(job.files.checkpoints)
    except (ValueError, KeyError, TypeError):
        names = [""]
    if all(name and (snapshot.parent / name).is_dir() for name in names):
        return None
    logger.warning(
        "%s is damaged (killed while it was written?); going on from the newest complete checkpoint", snapshot
    )
    snapshot.replace(snapshot.with_suffix(".damaged"))
    return newest_complete(job.files.checkpoints)
