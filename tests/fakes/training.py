"""One attempt at a training run without Ray, against the fake stream: in this process, or of several workers."""

from __future__ import annotations

import faulthandler
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from services.distill.checkpoint import KeepCheckpoint
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.jobs.storage import newest_complete
from tests.fakes.fusion_stream import FakeFusion

SETTINGS = {
    "lambda": 0.3, "epochs": 2, "batch_windows": 4, "learning_rate": 3e-3, "checkpoint_every_steps": 3, "seed": 5,
}  # fmt: skip


def job_in(
    folder: Path, target_folder: Path, *, expected: Mapping[str, str] | None = None, **changes: object
) -> DistillJob:
    """A run with `changes` to the settings of training; `expected` is what its recipe says of the service."""
    config = DistillConfig.model_validate(SETTINGS | changes)
    return DistillJob("run", folder, target_folder, "toy", "train", "nowhere:1", config, expected=expected or {})


def keeping(job: DistillJob) -> KeepCheckpoint:
    """Keep checkpoints below the run's folder: the parts of all workers in one folder, as Ray Train does."""

    def keep(_metrics: dict, folder: Path, step: int) -> None:
        kept = job.files.checkpoints / f"step-{step}"
        for file in folder.rglob("*"):
            if file.is_file():
                into = kept / file.relative_to(folder)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, into)

    return keep


def train(job: DistillJob, fusion: FakeFusion) -> None:
    """One attempt: goes on from the newest checkpoint, keeps its own."""
    newest = newest_complete(job.checkpoints)
    with newest.local() if newest else nullcontext() as restore_from:
        worker = DistillWorker(
            job, make_plan(job, fusion), fusion, World(), restore_from=restore_from, keep_checkpoint=keeping(job)
        )
    worker.run()


def run_workers(work: Callable[..., None], *arguments: Any, num_workers: int, meeting: Path) -> list[int | None]:
    """Call `work(rank, *arguments)` in processes of one gloo group; return their exit codes.

    `meeting` is a file that is not there yet, where they find each other. The processes are forked from one that has
    imported what the test has, so that they start at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    workers = [
        context.Process(target=_join_group, args=(rank, num_workers, str(meeting), work, arguments), daemon=True)
        for rank in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    return [worker.exitcode for worker in workers]


def _join_group(
    rank: int, num_workers: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    faulthandler.enable()  # gloo's own thread has crashed once: should it again, this says in what
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def numbers(value: Any) -> list[Any]:
    """What stands in a value of metrics.jsonl, mappings in the order of their keys."""
    if isinstance(value, dict):
        return [*sorted(value), *(number for key in sorted(value) for number in numbers(value[key]))]
    return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
