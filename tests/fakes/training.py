"""One attempt at a training run without Ray, against the fake stream."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
