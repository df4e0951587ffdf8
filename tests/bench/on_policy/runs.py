"""The runs of the benchmark: warm-up, on-policy, off-policy, and on-policy once more under SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from services.corpus.ledger import Corpus
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.fusion.client import FusionClient
from services.jobs.step_log import last_row, read_rows
from services.jobs.storage import newest_complete
from services.recipes.recipe import Recipe
from tests.bench.on_policy.services import Size
from tests.fakes.training import keeping

ROUNDS, SHARE = 3, 0.5
_PROMPT_BYTES = 60
_COMMON = {
    "lambda": 0.0, "loss": "reverse_kl", "learning_rate": 5e-4, "schedule": "constant",
    "warmup_share": 0.0, "keep_checkpoints": 99,
}  # fmt: skip


def write_prompts(recipe: Recipe, split: str, file: Path) -> Path:
    """Write the beginnings of a split's windows as prompts, each cut behind a word."""
    corpus = Corpus.open(recipe.corpus_folder)
    texts = (text[:_PROMPT_BYTES].decode(errors="ignore").rpartition(" ")[0] for text in corpus.texts(split))
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts if text), encoding="utf-8")
    return file


class Runs:
    """Runs of one target below a folder, which is emptied first."""

    def __init__(self, size: Size, recipe: Recipe, address: str) -> None:
        self.size, self._recipe, self._address = size, recipe, address
        self.folder = recipe.run_folder / "runs"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.prompts = {
            split: write_prompts(recipe, split, self.folder / f"{split}.jsonl") for split in ("train", "held_out")
        }

    def warm(self) -> Path:
        """Train the target by CLM only; return its folder, from which the others start."""
        settings = {"lambda": 1.0, "epochs": self.size.warm_epochs, "batch_windows": 8, "learning_rate": 2e-3}
        job = self.job("warm", self._recipe.target_folder, settings)
        attempt(job)
        return job.files.model

    def on_policy(self, name: str, target: Path, **settings: Any) -> DistillJob:
        """The run in rounds."""
        on_policy = {
            "prompts": [str(self.prompts["train"])], "rounds": ROUNDS, "round_steps": self.size.round_steps,
            "share": SHARE, "max_new_tokens": self.size.max_new_tokens, "in_flight": 4,
        }  # fmt: skip
        checkpoints = {"checkpoint_every_steps": self.size.round_steps}
        return self.job(name, target, self._common | checkpoints | settings | {"on_policy": on_policy})

    def off_policy(self, name: str, target: Path, on_policy: DistillJob) -> DistillJob:
        """The run over the stream alone, with at least as many tokens as `on_policy` took."""
        rows = read_rows(on_policy.files.metrics)
        streamed = sum(row["tokens"] * (1 - row["on_policy"]["share"]) for row in rows)
        batch = self.size.batch_windows
        windows = sum(row["windows"] - row["on_policy"]["windows"] for row in rows)
        steps = -(-rows[-1]["total_tokens"] // (streamed / windows * batch * ROUNDS))
        stages = [{"name": "stream", "share": 1.0}]
        settings = {"stages": stages, "num_windows": int(steps) * batch * ROUNDS, "checkpoint_every_steps": int(steps)}
        return self.job(name, target, self._common | settings)

    @property
    def _common(self) -> dict[str, Any]:
        return _COMMON | {"batch_windows": self.size.batch_windows}

    def job(self, name: str, target: Path, settings: dict[str, Any]) -> DistillJob:
        config = DistillConfig.model_validate({"device": "cpu", "torch_threads": 1, **settings})
        return DistillJob(name, self.folder / name, target, self._recipe.corpus.name, "train", self._address, config)


def attempt(job: DistillJob) -> None:
    """Train from the newest checkpoint to the end."""
    torch.set_num_threads(1)
    client = FusionClient(job.fusion_address, timeout_seconds=3600)
    newest = newest_complete(job.checkpoints)
    with newest.local() if newest else nullcontext() as restore_from:
        worker = DistillWorker(
            job, make_plan(job, client), client, World(), restore_from=restore_from, keep_checkpoint=keeping(job)
        )
    worker.run()


def killed(job: DistillJob, times: int) -> list[int]:
    """Train in processes that are killed inside a round, so many times, then to the end; return the steps then done."""
    draw, done = random.Random(0), []
    context = multiprocessing.get_context("spawn")
    round_steps = job.config.on_policy.round_steps if job.config.on_policy else 1
    for _ in range(times):
        newest = newest_complete(job.checkpoints)
        begun = int(newest.name.removeprefix("step-")) if newest else 0
        wanted = begun + job.config.checkpoint_every_steps + draw.randrange(2)
        process = context.Process(target=attempt, args=(job,))
        process.start()
        while process.is_alive():
            step = int((last_row(job.files.ledger) or {"step": 0})["step"])
            if step >= wanted and step % round_steps:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                done.append(step)
                break
            time.sleep(0.02)
        process.join()
    process = context.Process(target=attempt, args=(job,))
    process.start()
    process.join()
    assert process.exitcode == 0, "the run did not end"
    return done
