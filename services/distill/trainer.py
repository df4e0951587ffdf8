"""The training loop of one worker: plain torch, no Ray. `services.distill.train` runs it on Ray Train."""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.common.cursor import Cursor
from services.common.errors import FailedPreconditionError
from services.distill.batch import collate
from services.distill.checkpoint import Position, load_state, optimizer_state, restore_optimizer, save_checkpoint
from services.distill.config import DistillConfig
from services.distill.feed import FusionStream, WindowFeed
from services.distill.heldout import heldout_nats_per_byte
from services.distill.job import DistillJob
from services.distill.metrics import StepMeter
from services.distill.model import DistillModule, load_model, save_model
from services.distill.plan import RunPlan
from services.distill.progress import ProgressPrinter
from services.distill.runlog import RunLogs
from services.distill.world import World
from services.fusion.client import FusedWindow, StreamRequest

Report = Callable[[dict[str, Any], Path | None, int], None]
"""Receives metrics, the folder of a checkpoint (rank 0 only) and the step; called by all ranks at the same steps."""


def _keep_nothing(metrics: dict[str, Any], folder: Path | None, step: int) -> None:
    return


class Trainer:
    """One worker of a run. `run` takes all steps that are left and saves the model."""

    def __init__(
        self,
        job: DistillJob,
        plan: RunPlan,
        client: FusionStream,
        world: World,
        *,
        restore_from: Path | None = None,
        report: Report = _keep_nothing,
    ) -> None:
        """Loads the target, or the checkpoint in `restore_from`; raises FailedPreconditionError when that belongs to
        another run, ValueError when the model cannot be used."""
        self._job, self._plan, self._config, self._world = job, plan, job.config, world
        self._client, self._report = client, report
        self._position = Position(step=0, windows=0, tokens=0, world_size=world.size, cursor=None, plan=plan.identity)
        state: dict[str, Any] | None = None
        if restore_from is not None:
            state, self._position = load_state(restore_from)
            if self._position.plan != plan.identity:
                raise FailedPreconditionError(
                    f"checkpoint: {restore_from.name} belongs to another target, data set or training settings; "
                    "start over (--start-over) or choose another run name"
                )
        self._model = load_model(restore_from or job.target_folder).to(world.device).train()
        if job.config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._bare = DistillModule(
            self._model,
            vocabulary_size=min(plan.vocabulary_size, int(self._model.get_output_embeddings().weight.shape[0])),
            loss=job.config.loss,
            temperature=job.config.temperature,
            autocast=torch.bfloat16 if job.config.dtype == "bfloat16" else None,
        )
        self._module = world.parallel(self._bare)
        self._optimizer = _make_optimizer(self._module, job.config)
        if state is not None:
            restore_optimizer(self._module, self._optimizer, state)

    def run(self) -> Position:
        """Raises ServiceError or ValueError when the stream breaks or does not fit, ArithmeticError on divergence."""
        config, rank = self._config, self._world.rank
        total_steps, steps_per_epoch = self._plan.total_steps(config), self._plan.steps_per_epoch(config)
        start = self._position
        feed = WindowFeed(
            self._client,
            self._request(self._job.split, num_epochs=config.epochs, cursor=start.cursor_for(self._world.size)),
            batch_windows=config.batch_windows // self._world.size,
            prefetch_windows=config.prefetch_windows,
        )
        progress = ProgressPrinter(
            self._job.run_name, total_steps, done_steps=start.step, done_tokens=start.tokens, enabled=rank == 0
        )
        logs = RunLogs(self._job.files, after_step=start.step, enabled=rank == 0)
        with closing(logs), closing(feed):
            for step in range(start.step, total_steps):
                epoch, step_in_epoch = divmod(step, steps_per_epoch)
                row, windows = self._step(step, epoch, feed, total_steps)
                self._advance(row, feed.cursor, end_of_epoch=step_in_epoch == steps_per_epoch - 1)
                logs.step(row, self._indices(windows))
                if config.eval_every_steps and (step + 1) % config.eval_every_steps == 0:
                    logs.evaluation(step + 1, epoch, self._evaluate())
                progress.show(row)
                if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == total_steps:
                    logs.sync()
                    self._checkpoint(row)
        if rank == 0:
            self._save_final()
        return self._position

    def _step(
        self, step: int, epoch: int, feed: WindowFeed, total_steps: int
    ) -> tuple[dict[str, Any], list[FusedWindow]]:
        """One optimiser step; returns the metrics of the global batch and this worker's windows."""
        config, world = self._config, self._world
        meter = StepMeter(world)
        waited_before = feed.wait_seconds
        windows = feed.take(epoch)
        waited = feed.wait_seconds - waited_before
        blocks = [window.block for window in windows]
        size, tokens_only = self._bare.vocabulary_size, config.lambda_ == 1.0
        batch = collate(blocks, self._plan.bos, vocabulary_size=size, tokens_only=tokens_only).to(world.device)
        tokens, fused, num_windows = world.sum([batch.num_tokens, batch.num_fused, len(windows)])
        if tokens == 0:
            raise FailedPreconditionError(f"split: the stream ended in epoch {epoch}, before step {step + 1}")
        # Dropout of a step is the same however the run got here.
        torch.manual_seed(_step_seed(config.seed, step, world.rank))
        # DDP averages gradients over the workers. The short batch at the end of an epoch counts by its windows.
        scale = world.size * num_windows / config.batch_windows
        clm_N = torch.full((batch.num_tokens,), config.lambda_ * scale / tokens, device=world.device)
        fusion_N = torch.full_like(clm_N, (1 - config.lambda_) * scale / max(1.0, fused))
        losses = self._module(batch, clm_N, None if tokens_only else fusion_N)
        losses.total.backward()
        rate = config.learning_rate_at(step, total_steps)
        norm = self._update(rate)
        meter.add(blocks, batch, losses)
        sums = meter.row(waited_seconds=waited)
        loss = sums["clm"] if tokens_only else config.lambda_ * sums["clm"] + (1 - config.lambda_) * sums["fusion"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ArithmeticError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}: training has diverged; the last checkpoint is "
                "unharmed (look at distill.learning_rate, and for a source that answers nonsense)"
            )
        settings = {"lambda": config.lambda_, "learning_rate": rate, "gradient_norm": norm}
        return {"step": step + 1, "epoch": epoch, "loss": loss, **settings, **sums}, windows

    def _update(self, rate: float) -> float:
        """Takes the optimiser's step; returns the gradient's norm before clipping."""
        parameters = [p for p in self._module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._config.clip_norm or math.inf))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _advance(self, row: dict[str, Any], cursor: Cursor | None, *, end_of_epoch: bool) -> None:
        """Moves the position behind a step, and puts the totals into its metrics."""
        row["total_tokens"] = self._position.tokens + row["tokens"]
        row["total_windows"] = self._position.windows + row["windows"]
        expected = (row["epoch"] + 1) * self._plan.num_windows
        if end_of_epoch and row["total_windows"] != expected:
            raise FailedPreconditionError(
                f"split: {row['total_windows']} windows came until the end of epoch {row['epoch']}, not {expected}; "
                "the data set has changed"
            )
        if end_of_epoch and cursor is not None:
            # Shards may differ by a window at the end of an epoch; the start of the next is the same for all ranks.
            cursor = Cursor(epoch=row["epoch"] + 1, dealt=0, received=0, plan=cursor.plan)
        self._position = replace(
            self._position,
            step=row["step"],
            windows=row["total_windows"],
            tokens=row["total_tokens"],
            world_size=self._world.size,
            cursor=cursor,
        )

    def _indices(self, windows: Sequence[FusedWindow]) -> list[int]:
        """Places in the split's ledger of the windows that all workers consumed in this step."""
        return sorted(itertools.chain(*self._world.gather([window.index for window in windows])))

    def _evaluate(self) -> float:
        return heldout_nats_per_byte(
            self._bare,
            self._client,
            self._request(self._job.eval_split, num_epochs=1, cursor=None),
            self._world,
            bos=self._plan.bos,
            batch_windows=max(1, self._config.batch_windows // self._world.size),
        )

    def _checkpoint(self, row: dict[str, Any]) -> None:
        optimizer = optimizer_state(self._module, self._optimizer)
        row = {key: row[key] for key in ("step", "epoch", "loss", "total_tokens")}
        if self._world.rank != 0:
            self._report(row, None, self._position.step)
            return
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as folder:
            save_checkpoint(Path(folder), self._model, self._job.target_folder, optimizer, self._position)
            self._report(row, Path(folder), self._position.step)

    def _save_final(self) -> None:
        final = self._job.files.model
        making = final.with_name(".model.making")
        shutil.rmtree(making, ignore_errors=True)
        save_model(self._model, self._job.target_folder, making)
        shutil.rmtree(final, ignore_errors=True)
        making.rename(final)

    def _request(self, split: str, *, num_epochs: int, cursor: Cursor | None) -> StreamRequest:
        return StreamRequest(
            dataset=self._job.dataset,
            split=split,
            seed=self._config.seed,
            rank=self._world.rank,
            world_size=self._world.size,
            num_epochs=num_epochs,
            cursor=cursor,
            k=self._config.k,
            tokens_only=self._config.lambda_ == 1.0,
            expected_vocabulary=self._plan.vocabulary,
        )


def _make_optimizer(module: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
