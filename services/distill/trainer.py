"""The training loop of one worker. The gradient of a step and the making of a checkpoint are handed in."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusion_core.blocks import Block
from services.base.errors import FailedPreconditionError, UnavailableError
from services.distill.accounting import Accounts
from services.distill.config import DistillConfig
from services.distill.curriculum import WHOLE_TRAIN
from services.distill.data.feed import StepWindows, WindowFeed
from services.distill.learning_rate import learning_rate
from services.distill.on_policy.rounds import OwnShare, Rounds
from services.distill.optimizer import TargetOptimizer
from services.distill.plan import RunPlan
from services.distill.step_meter import StepLosses, StepMeter, StepTotals
from services.distill.workers.world import World
from services.fusion.client import FusedWindow, SkippedWindow
from services.jobs.step_log import LedgerPlaces, RunLogs

Backward = Callable[[Sequence[Block], int, StepTotals, Sequence[Block]], StepLosses]
"""A function that adds a step's gradient, from this worker's blocks of the stream, the step counted from 0, its size,
and this worker's blocks of the target's own answers."""

StepObserver = Callable[[dict[str, Any]], None]
"""A function of the metrics of every step."""

BeginStage = Callable[[int], None]
"""A function of the epoch or stage that begins, or goes on in a resumed run."""

Evaluate = Callable[[], float]
"""A function that returns nats per byte of the held-out split; all workers call it at the same steps."""


class Trainer:
    """The steps of a run: windows, gradient, update, a line in every log, and at intervals a checkpoint."""

    def __init__(
        self,
        config: DistillConfig,
        plan: RunPlan,
        world: World,
        accounts: Accounts,
        optimizer: TargetOptimizer,
        *,
        backward: Backward,
        begin_stage: BeginStage,
        evaluate: Evaluate,
        save_checkpoint: StepObserver,
        observers: Sequence[StepObserver] = (),
        rounds: Rounds | None = None,
    ) -> None:
        """Take the parts of a run; training begins at the position of `accounts`, and all workers save checkpoints.

        `rounds` hold the target's own answers; `begin_stage` begins them.
        """
        self._config, self._world, self._accounts, self._optimizer = config, world, accounts, optimizer
        self._backward, self._begin_stage, self._evaluate = backward, begin_stage, evaluate
        self._save_checkpoint, self._rounds = save_checkpoint, rounds
        self._observers = observers
        self._total_steps, self._plan = plan.total_steps(config), plan

    def run(self, feed: WindowFeed, logs: RunLogs) -> None:
        """Take all remaining steps.

        Raises ServiceError or ValueError when the stream breaks or does not fit, ArithmeticError on divergence.
        """
        config, current = self._config, -1
        for step in range(self._accounts.position.step, self._total_steps):
            epoch, is_last = self._plan.epoch_of(step, config)
            if epoch != current:
                self._begin_stage(epoch)
                current = epoch
            row, taken, own = self._step(step, epoch, feed)
            row = self._accounts.advance(row, feed.cursor, end_of_epoch=is_last)
            answers = {} if self._rounds is None else self._rounds.place(own)
            logs.step(row, self._places(taken.windows), self._places(taken.skipped), answers)
            if config.eval_every_steps and (step + 1) % config.eval_every_steps == 0:
                logs.evaluation(step + 1, epoch, self._evaluate())
            for observe in self._observers:
                observe(row)
            if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == self._total_steps:
                logs.sync()
                self._save_checkpoint(row)

    def _step(self, step: int, epoch: int, feed: WindowFeed) -> tuple[dict[str, Any], StepWindows, OwnShare]:
        """Take one optimiser step; return the metrics of the global batch and this worker's share of it."""
        meter = StepMeter(self._world, tokens_only=self._config.tokens_only)
        waited_before, rounds = self._waited(feed), self._rounds
        shares = self._accounts.shares(epoch)
        taken = feed.take(epoch, shares[self._world.rank])
        own = OwnShare() if rounds is None else rounds.take(step)
        waited = self._waited(feed) - waited_before
        if rounds is not None:
            shares = [sum(both) for both in zip(shares, rounds.shares(step), strict=True)]
        blocks = [window.block for window in taken.windows]
        skipped = len(taken.skipped) + len(own.left_out)
        totals = meter.take(blocks, own.blocks, skipped=skipped, most_windows=max(shares))
        if totals.tokens == 0:
            where = f"epoch {epoch}, before step {step + 1}"
            if meter.skipped_anywhere():
                raise UnavailableError(f"{where}: every window was left out for want of sources; nothing to train on")
            raise FailedPreconditionError(f"split: the stream ended in {where}")
        # Dropout of a step is the same whether the run was resumed or not.
        torch.manual_seed(_step_seed(self._config.seed, step, self._world.rank))
        losses = self._backward(blocks, step, totals, own.blocks)
        rate = learning_rate(self._config, step, self._total_steps, stage=epoch)
        norm = self._optimizer.step(rate)
        row = {
            "step": step + 1,
            "epoch": epoch,
            **({"stage": self._config.stages[epoch].name} if self._config.stages else {}),
            **losses.coefficients,
            "learning_rate": rate,
            "gradient_norm": norm,
            **meter.row(losses, totals, waited_seconds=waited),
            **({} if rounds is None else {"on_policy": rounds.figures(step, own, losses, totals)}),
        }
        if not math.isfinite(row["loss"]) or not math.isfinite(norm):
            raise ArithmeticError(
                f"step {step + 1}: loss {row['loss']}, gradient norm {norm}: training has diverged; the last "
                "checkpoint is unharmed (look at distill.learning_rate, and for a source that answers nonsense)"
            )
        return row, taken, own

    def _waited(self, feed: WindowFeed) -> float:
        return feed.wait_seconds + (0.0 if self._rounds is None else self._rounds.wait_seconds)

    def _places(self, windows: Sequence[FusedWindow | SkippedWindow]) -> LedgerPlaces:
        """Return the indices of this step's windows, of all workers together: in the split, or by split with stages."""
        gathered = self._world.gather([(window.pool, window.index) for window in windows])
        places = sorted(itertools.chain(*gathered))
        if not self._config.stages:
            return [index for _, index in places]
        by_split: dict[str, list[int]] = {}
        for pool, index in places:
            by_split.setdefault(pool or WHOLE_TRAIN, []).append(index)
        return by_split


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
