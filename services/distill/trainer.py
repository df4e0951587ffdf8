"""The training loop of one worker: plain torch, no Ray. `services.distill.driver` runs it on Ray Train."""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fusion_core.blocks import Block
from fusion_core.losses import source_reward
from services.base.errors import FailedPreconditionError, UnavailableError
from services.distill.checkpoint import Position, load_state, optimizer_state, restore_optimizer, save_state
from services.distill.config import DistillConfig
from services.distill.data.batch import collate, pack
from services.distill.data.feed import Batch, FusionStream, WindowFeed, share_of
from services.distill.heldout import heldout_nats_per_byte
from services.distill.job import DistillJob
from services.distill.plan import RunPlan
from services.distill.step_meter import StepMeter
from services.distill.target.module import DistillModule
from services.distill.target.trained import TrainedTarget
from services.distill.workers.parallel import gradients_kept_back, whole_state
from services.distill.workers.world import World
from services.fusion.client import FusedWindow, SkippedWindow, StreamRequest
from services.jobs.progress_line import ProgressPrinter
from services.jobs.step_log import RunLogs
from services.wire.cursor import Cursor

Report = Callable[[dict[str, Any], Path | None, int], None]
"""Receives metrics, the folder of a checkpoint (rank 0 only) and the step; called by all ranks at the same steps."""

Observe = Callable[[dict[str, Any]], None]
"""Receives the metrics of every step."""


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
        observe: Observe | None = None,
    ) -> None:
        """Loads the target, or the checkpoint in `restore_from`; raises FailedPreconditionError when that belongs to
        another run, ValueError when the model cannot be used."""
        self._job, self._plan, self._config, self._world = job, plan, job.config, world
        self._client, self._report, self._observe = client, report, observe
        self._position = Position(step=0, windows=0, tokens=0, cursor=None, plan=plan.identity)
        state: dict[str, Any] | None = None
        if restore_from is not None:
            state, self._position = load_state(restore_from)
            if self._position.plan != plan.identity:
                raise FailedPreconditionError(
                    f"checkpoint: {restore_from.name} belongs to another target, data set or training settings; "
                    "start over (--start-over) or choose another run name"
                )
        self._dealt = self._position.cursor.dealt if self._position.cursor else 0
        self._target = TrainedTarget(job, world.device, restore_from=restore_from)
        self._bare = DistillModule(
            self._target.model,
            vocabulary_size=min(plan.vocabulary_size, self._target.head_rows),
            loss=job.config.loss,
            temperature=job.config.temperature,
            beta=job.config.jsd_beta,
            autocast=torch.bfloat16 if job.config.dtype == "bfloat16" else None,
        )
        if job.config.pack_tokens is not None:
            self._bare.check_packing()
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
            self._request(self._job.split, num_epochs=config.epochs, cursor=start.cursor),
            batch_windows=-(-config.batch_windows // self._world.size),
            prefetch_windows=config.prefetch_windows,
        )
        progress = ProgressPrinter(
            self._job.run_name, total_steps, done_steps=start.step, done_tokens=start.tokens, enabled=rank == 0
        )
        logs = RunLogs(self._job.files, after_step=start.step, enabled=rank == 0)
        with closing(logs), closing(feed):
            for step in range(start.step, total_steps):
                epoch, step_in_epoch = divmod(step, steps_per_epoch)
                row, taken = self._step(step, epoch, feed, total_steps)
                self._advance(row, feed.cursor, end_of_epoch=step_in_epoch == steps_per_epoch - 1)
                logs.step(row, self._indices(taken.windows), self._indices(taken.skipped))
                if self._observe is not None:
                    self._observe(row)
                if config.eval_every_steps and (step + 1) % config.eval_every_steps == 0:
                    logs.evaluation(step + 1, epoch, self._evaluate())
                progress.show(row)
                if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == total_steps:
                    logs.sync()
                    self._checkpoint(row)
        weights = self._weights()
        if rank == 0:
            self._target.save_final(weights)
        return self._position

    def _step(self, step: int, epoch: int, feed: WindowFeed, total_steps: int) -> tuple[dict[str, Any], Batch]:
        """One optimiser step; returns the metrics of the global batch and this worker's share of it."""
        config, world = self._config, self._world
        meter = StepMeter(world, tokens_only=config.tokens_only)
        waited_before = feed.wait_seconds
        taken = feed.take(epoch, self._share(epoch))
        waited = feed.wait_seconds - waited_before
        blocks = [window.block for window in taken.windows]
        meter.take(blocks, skipped=len(taken.skipped))
        lambda_ = config.lambda_at(step, total_steps)
        # Dropout of a step is the same however the run got here.
        torch.manual_seed(_step_seed(config.seed, step, world.rank))
        self._backward(blocks, lambda_, meter, f"epoch {epoch}, before step {step + 1}")
        rate = config.learning_rate_at(step, total_steps)
        norm = self._update(rate)
        row = {
            "step": step + 1,
            "epoch": epoch,
            "lambda": lambda_,
            "learning_rate": rate,
            "gradient_norm": norm,
            **meter.row(waited_seconds=waited),
        }
        if not math.isfinite(row["loss"]) or not math.isfinite(norm):
            raise ArithmeticError(
                f"step {step + 1}: loss {row['loss']}, gradient norm {norm}: training has diverged; the last "
                "checkpoint is unharmed (look at distill.learning_rate, and for a source that answers nonsense)"
            )
        return row, taken

    def _share(self, epoch: int) -> int:
        """This worker's windows of the next step: of the epoch's order, those that the stream deals to its rank."""
        start = self._position.windows - epoch * self._plan.num_windows
        stop = min(start + self._config.batch_windows, self._plan.num_windows)
        return share_of(self._world.rank, self._world.size, start, stop, dealt=self._dealt)

    def _backward(self, blocks: list[Block], lambda_: float, meter: StepMeter, where: str) -> None:
        """Gradients of the global batch, by as many forward passes as the micro-batches need; all workers take the
        same number of them."""
        config, world = self._config, self._world
        tokens_only = config.tokens_only
        fused_here = 0 if tokens_only else sum(int(block.mask_T.sum()) for block in blocks)
        tokens, fused, num_windows = world.sum([sum(block.num_tokens for block in blocks), fused_here, len(blocks)])
        if tokens == 0 and meter.skipped_anywhere():
            raise UnavailableError(f"{where}: every window was left out for want of sources; nothing to train on")
        if tokens == 0:
            raise FailedPreconditionError(f"split: the stream ended in {where}")
        # Gradients are averaged over the workers. The short batch at the end of an epoch counts by its windows.
        scale = world.size * num_windows / config.batch_windows
        most = -(-config.batch_windows // world.size)
        size = config.micro_batch_windows or most
        starts = range(0, most, size)
        for start in starts:
            rows = pack(blocks[start : start + size], config.pack_tokens)
            batch = collate(
                rows, self._plan.bos, vocabulary_size=self._bare.vocabulary_size, tokens_only=tokens_only
            ).to(world.device)
            lambda_N = _lambdas(rows, lambda_, reward_weighting=config.reward_weighting).to(world.device)
            clm_N = lambda_N * (scale / tokens)
            fusion_N = None if tokens_only else (1 - lambda_N) * (scale / max(1.0, fused))
            with gradients_kept_back(self._module, enabled=start != starts[-1]):
                losses = self._module(batch, clm_N, fusion_N)
                losses.total.backward()
            meter.add(losses, scale=scale)

    def _update(self, rate: float) -> float:
        """Takes the optimiser's step; returns the gradient's norm before clipping."""
        parameters = [p for p in self._module.parameters() if p.grad is not None]
        norm_ = torch.nn.utils.clip_grad_norm_(parameters, self._config.clip_norm or math.inf)
        norm = float(norm_.full_tensor() if isinstance(norm_, DTensor) else norm_)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _advance(self, row: dict[str, Any], cursor: Cursor | None, *, end_of_epoch: bool) -> None:
        """Moves the position behind a step, and puts the totals into its metrics."""
        row["total_tokens"] = self._position.tokens + row["tokens"]
        row["total_windows"] = self._position.windows + row["windows"] + row["skipped"]
        expected = (row["epoch"] + 1) * self._plan.num_windows
        if end_of_epoch and row["total_windows"] != expected:
            raise FailedPreconditionError(
                f"split: {row['total_windows']} windows came until the end of epoch {row['epoch']}, not {expected}; "
                "the data set has changed"
            )
        if cursor is not None:
            # In these terms the position is the same for all ranks, and for any number of them.
            epoch = row["epoch"] + end_of_epoch
            dealt = row["total_windows"] - epoch * self._plan.num_windows
            cursor = Cursor(epoch=epoch, dealt=dealt, received=0, plan=cursor.plan)
        if end_of_epoch:
            self._dealt = 0
        self._position = replace(
            self._position,
            step=row["step"],
            windows=row["total_windows"],
            tokens=row["total_tokens"],
            cursor=cursor or self._position.cursor,
        )

    def _indices(self, windows: Sequence[FusedWindow | SkippedWindow]) -> list[int]:
        """Places in the split's ledger of windows of this step, of all workers together."""
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
        weights = self._weights()
        row = {key: row[key] for key in ("step", "epoch", "loss", "total_tokens")}
        if self._world.rank != 0:
            self._report(row, None, self._position.step)
            return
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as folder:
            self._target.save(Path(folder), weights)
            save_state(Path(folder), optimizer, self._position)
            self._report(row, Path(folder), self._position.step)

    def _weights(self) -> dict[str, Any] | None:
        """What is saved, gathered from all workers where they hold shards; None where the model has it all."""
        if self._config.lora is None and not isinstance(self._bare, FSDPModule):
            return None
        return whole_state(self._bare, trained_only=self._config.lora is not None)

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
            tokens_only=self._config.tokens_only,
            expected_vocabulary=self._plan.vocabulary,
            sources=self._config.sources or (),
        )


def _lambdas(rows: Sequence[Sequence[Block]], lambda_: float, *, reward_weighting: bool) -> Tensor:
    """Lambda of every token, [N]: the schedule's, or by the reward of the window's best source."""
    parts = [torch.empty(0)]
    for block in itertools.chain(*rows):
        reward = 1.0
        if reward_weighting:
            losses = [share.nats_per_byte for share in block.shares if share.present]
            reward = source_reward(losses, len(block.text_bytes), block.num_text_tokens)
        parts.append(torch.full((block.num_tokens,), 1 - (1 - lambda_) * reward))
    return torch.cat(parts)


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
