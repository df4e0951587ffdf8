"""One worker of a run, put together: target, stream, objective, logs and checkpoints. Plain torch, no Ray:
`services.distill.driver` runs it on Ray Train."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from services.base.atomic import write_whole
from services.base.errors import FailedPreconditionError
from services.distill.accounting import Accounts, Position
from services.distill.checkpoint import Checkpoints, KeepCheckpoint, load_position, restore_optimizer
from services.distill.data.feed import EmptyStream, FusionStream, WindowFeed
from services.distill.heldout import heldout_nats_per_byte
from services.distill.job import DistillJob
from services.distill.objective import FusionObjective
from services.distill.on_policy.feed import AnswerFeed, TextFuser
from services.distill.on_policy.rounds import Rounds
from services.distill.on_policy.whole_target import WholeTarget
from services.distill.on_policy.writer import AnswerWriter
from services.distill.optimizer import TargetOptimizer
from services.distill.plan import RunPlan
from services.distill.target.module import DistillModule
from services.distill.target.rope import check_rope, set_rope_theta
from services.distill.target.trained import TrainedTarget
from services.distill.trainer import StepObserver, Trainer
from services.distill.workers.world import World
from services.fusion.client import StreamPart, StreamRequest
from services.jobs.progress_line import ProgressPrinter
from services.jobs.step_log import RunLogs
from services.wire.cursor import Cursor


def _keep_nothing(metrics: dict[str, Any], folder: Path, step: int) -> None:
    return


class DistillWorker:
    """A worker that trains the target from the run's position; `run` takes all remaining steps and saves the model."""

    def __init__(
        self,
        job: DistillJob,
        plan: RunPlan,
        client: FusionStream,
        world: World,
        *,
        restore_from: Path | None = None,
        keep_checkpoint: KeepCheckpoint = _keep_nothing,
    ) -> None:
        """Load the target, or the checkpoint in `restore_from`.

        Raises FailedPreconditionError when the checkpoint belongs to another run, ValueError when the model cannot be
        used.
        """
        self._job, self._plan, self._config, self._world, self._client = job, plan, job.config, world, client
        start = Position(step=0, windows=0, tokens=0, cursor=None, identity=plan.identity)
        if restore_from is not None:
            start = load_position(restore_from)
            if start.identity != plan.identity:
                raise FailedPreconditionError(
                    f"checkpoint: {restore_from.name} belongs to another target, data set or training settings; "
                    "start over (--start-over) or choose another run name"
                )
        self._accounts = Accounts(start, world, plan, batch_windows=job.config.stream_windows)
        # Sharded weights come from rank 0, and go to their devices one layer after the other.
        sharded = job.config.parallel == "fsdp" and world.size > 1
        empty = sharded and world.rank != 0
        self._target = TrainedTarget(job.target_folder, job.config, restore_from=restore_from, empty=empty)
        if any(stage.rope_theta is not None for stage in job.config.stages or ()):
            check_rope(self._target.model)
        if not sharded:
            self._target.model.to(world.device)
        self._module = self._bare_module()
        if job.config.pack_tokens is not None and not empty:
            self._module.check_packing()
        parallel = world.parallel(self._module)
        self._optimizer = TargetOptimizer(parallel, job.config)
        if restore_from is not None:
            restore_optimizer(parallel, self._optimizer.adamw, restore_from)
        self._objective = FusionObjective(
            self._module, parallel, job.config, world, bos=plan.bos, steps=plan.total_steps(job.config)
        )
        self._checkpoints = Checkpoints(
            self._target, self._module, parallel, self._optimizer.adamw, world, keep=keep_checkpoint
        )
        self._rounds = self._make_rounds()

    @property
    def position(self) -> Position:
        """The position that training goes on from."""
        return self._accounts.position

    def run(self, *observers: StepObserver) -> Position:
        """Train to the end and return the position there; raises what `Trainer.run` raises.

        Observers are called with the metrics of every step.
        """
        config, rank, start = self._config, self._world.rank, self._accounts.position
        feed = WindowFeed(
            self._client if config.stream_windows else EmptyStream(),
            self._request(
                self._job.split, num_epochs=config.epochs, parts=self._plan.stream_parts, cursor=start.cursor
            ),
            batch_windows=max(1, -(-config.stream_windows // self._world.size)),
            prefetch_windows=config.prefetch_windows,
        )
        progress = ProgressPrinter(
            self._job.run_name,
            self._plan.total_steps(config),
            # The windows of a stage or round are new ones, as those of a first epoch are.
            steps_per_epoch=self._plan.total_steps(config)
            if config.stages or config.on_policy
            else self._plan.steps_until(1, config),
            done_tokens=start.tokens,
            enabled=rank == 0,
        )
        trainer = Trainer(
            config,
            self._plan,
            self._world,
            self._accounts,
            self._optimizer,
            backward=self._objective.backward,
            begin_stage=self._begin_stage,
            evaluate=self._evaluate,
            save_checkpoint=self._save_checkpoint,
            observers=[*observers, progress.show],
            rounds=self._rounds,
        )
        logs = RunLogs(self._job.files, after_step=start.step, enabled=rank == 0)
        with closing(logs), closing(feed), closing(self._rounds) if self._rounds else nullcontext():
            trainer.run(feed, logs)
        weights = self._checkpoints.weights()
        if rank == 0:
            self._target.save_final(self._job.files, weights)
        return self._accounts.position

    def _bare_module(self) -> DistillModule:
        config = self._config
        return DistillModule(
            self._target.model,
            vocabulary_size=min(self._plan.vocabulary_size, self._target.head_rows),
            loss=config.loss,
            temperature=config.temperature,
            beta=config.jsd_beta,
            autocast=torch.bfloat16 if config.dtype == "bfloat16" else None,
        )

    def _save_checkpoint(self, row: dict[str, Any]) -> None:
        if self._world.rank == 0 and self._objective.routing is not None:
            write_whole(self._job.files.routing, json.dumps(self._objective.routing))
        self._checkpoints.save(row, self._accounts.position)

    def _begin_stage(self, stage: int) -> None:
        if (theta := self._config.rope_theta_at(stage)) is not None:
            set_rope_theta(self._target.model, theta)
        if self._rounds is not None:
            position = self._accounts.position
            name = self._rounds.begin(stage, position.step, identity=position.identity, begun=position.round)
            self._accounts.begin_round(name)

    def _make_rounds(self) -> Rounds | None:
        """Return the rounds of on-policy distillation; None for a run without."""
        on_policy = self._config.on_policy
        if on_policy is None:
            return None
        if not isinstance(self._client, TextFuser):
            raise FailedPreconditionError("distill.on_policy: this stream fuses no texts of its client")
        template = self._plan.settings.get("target.chat_template")
        folder, config, bos = self._job.target_folder, self._config, self._plan.bos
        target = WholeTarget(
            self._module,
            self._world,
            adapters=self._target.has_adapters,
            make_copy=lambda: TrainedTarget(folder, config, restore_from=None).model,
        )
        writer = AnswerWriter(target, folder, template, config, self._world, bos=bos)
        writer.check_prompts(self._plan.settings["distill.on_policy"]["prompts"])
        sources = self._config.sources or ()
        vocabulary, in_flight = self._plan.vocabulary, on_policy.in_flight
        feed = AnswerFeed(self._client, k=self._config.k, sources=sources, vocabulary=vocabulary, in_flight=in_flight)
        return Rounds(self._job.files.rounds, on_policy, target, writer, feed, self._world)

    def _evaluate(self) -> float:
        return heldout_nats_per_byte(
            self._module,
            self._client,
            self._request(self._job.eval_split, num_epochs=1, cursor=None),
            self._world,
            bos=self._plan.bos,
            batch_windows=max(1, self._config.batch_windows // self._world.size),
        )

    def _request(
        self, split: str, *, num_epochs: int, cursor: Cursor | None, parts: tuple[StreamPart, ...] = ()
    ) -> StreamRequest:
        return StreamRequest(
            dataset=self._job.dataset,
            split=split,
            seed=self._config.seed,
            rank=self._world.rank,
            world_size=self._world.size,
            num_epochs=num_epochs,
            parts=parts,
            cursor=cursor,
            k=self._config.k,
            tokens_only=self._config.tokens_only,
            expected_vocabulary=self._plan.vocabulary,
            sources=self._config.sources or (),
        )
