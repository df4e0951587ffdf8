"""The training loop: transformers' Trainer with the loss of InternLM2, on pairs that are in tokens already."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fusion_core.arrays import Int32
from fusion_core.preference.reward_losses import reward_loss
from services.base.atomic import whole_folder, write_whole
from services.base.errors import SettingError
from services.jobs.step_log import StepLog
from services.jobs.storage import MANIFEST, newest_complete
from services.jobs.tracking import Trackers
from services.models.chat_template import TurnRefusedError
from services.models.weights import quiet
from services.reward.config import RewardConfig
from services.reward.model import RewardCard, RewardTokenizer, load_scorer, pad, save_reward_model
from services.reward.pairs import Pair
from services.reward.train import RewardJob

logger = logging.getLogger(__name__)

TokenPair = tuple[Int32, Int32]
"""The conversations of a pair in tokens, the one with the better answer first."""


def train_to_end(job: RewardJob, identity: str) -> None:
    """Train from the newest whole checkpoint to the end; worker 0 saves the model into the run's folder.

    Raises SettingError when no pair can be used, ArithmeticError when training diverges.
    """
    config, files = job.config, job.files
    tokens = RewardTokenizer(job.start, config.domains, config.chat_template)
    rows = pairs_in_tokens(tokens, job.pairs(), config.max_tokens)
    card = RewardCard(dict(config.domains), config.max_tokens, config.gamma, config.barrier)
    torch.manual_seed(config.seed)
    newest = newest_complete(job.checkpoints)
    trainer = RewardTrainer(
        config,
        model=load_scorer(job.start, tokens.pad_id),
        args=_arguments(job, num_pairs=len(rows)),
        data_collator=lambda pairs: pad([p[0] for p in pairs] + [p[1] for p in pairs], tokens.pad_id),
        train_dataset=rows,
    )
    trainer.remove_callback(PrinterCallback)  # the run's own lines are fewer
    first = bool(trainer.is_world_process_zero())
    with ExitStack() as stack:
        if first:
            logs = _Logs(job, identity, trainer, after_step=newest.step if newest else 0)
            trainer.add_callback(stack.enter_context(logs))
        stack.enter_context(quiet())
        trainer.train(resume_from_checkpoint=str(Path(newest.location) / newest.name) if newest else None)
    if first:
        with whole_folder(files.model) as folder:
            save_reward_model(trainer.accelerator.unwrap_model(trainer.model), tokens, card, folder)


def pairs_in_tokens(tokens: RewardTokenizer, pairs: Sequence[Pair], max_tokens: int) -> list[TokenPair]:
    """Return the pairs in tokens; those with a longer conversation, or one that the template refuses, are left out.

    Raises SettingError when none is left.
    """
    rows, long, refused = [], 0, ""
    for pair in pairs:
        try:
            chosen, rejected = (tokens.encode(pair.messages, a, pair.domain) for a in (pair.chosen, pair.rejected))
        except TurnRefusedError as error:
            refused = str(error)
            continue
        if max(len(chosen), len(rejected)) > max_tokens:
            long += 1
        else:
            rows.append((chosen, rejected))
    if not rows:
        why = (
            f"the template refuses them: {refused}"
            if refused
            else f"none has at most {max_tokens} tokens on both sides"
        )
        raise SettingError("reward.data", f"no pair can be used; {why}")
    if left_out := len(pairs) - len(rows):
        logger.warning(
            "%d of %d pairs are left out: %d longer than reward.max_tokens, %d refused by the chat template (%s)",
            left_out, len(pairs), long, left_out - long, refused,
        )  # fmt: skip
    return rows


class RewardTrainer(Trainer):
    """transformers' trainer with the focal ranking loss and the barrier.

    Attributes:
        measured: figures of the last batch, for the log: share of pairs in the right order, mean margin, least and
            largest score.
    """

    def __init__(self, config: RewardConfig, **parts: Any) -> None:
        super().__init__(**parts)
        self._config = config
        self.measured: dict[str, float] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch whose first half holds the better answers."""
        scores_2B = model(**inputs).logits[:, 0].float()
        chosen_B, rejected_B = scores_2B.chunk(2)
        loss = reward_loss(chosen_B, rejected_B, gamma=self._config.gamma, barrier=self._config.barrier)
        if not math.isfinite(value := float(loss.detach())):
            raise ArithmeticError(f"loss {value}: training has diverged; look at reward.learning_rate")
        margin_B = (chosen_B - rejected_B).detach()
        self.measured = {
            "accuracy": float((margin_B > 0).float().mean()),
            "margin": float(margin_B.mean()),
            "least_score": float(scores_2B.detach().min()),
            "largest_score": float(scores_2B.detach().max()),
        }
        return (loss, scores_2B) if return_outputs else loss


def _arguments(job: RewardJob, *, num_pairs: int) -> TrainingArguments:
    config = job.config
    steps = config.epochs * math.ceil(num_pairs / config.batch_pairs)
    made = TrainingArguments(
        output_dir=job.checkpoints,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_pairs // max(1, config.num_workers),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_norm,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_share * steps),
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        save_strategy="steps",
        save_steps=config.checkpoint_every_steps,
        save_total_limit=config.keep_checkpoints,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    made._n_gpu = min(made.n_gpu, 1)  # else one process would spread its batch over all GPUs, and multiply it
    return made


class _Logs(TrainerCallback):
    """The metrics of every step, in the run's log and for trackers; and the manifest that ends a checkpoint."""

    def __init__(self, job: RewardJob, identity: str, trainer: RewardTrainer, *, after_step: int) -> None:
        self._job, self._identity, self._trainer = job, identity, trainer
        self._metrics = StepLog(job.files.metrics, after_step=after_step)
        self._trackers = Trackers(job.tracking, f"reward/{job.run_name}", job.files, after_step=after_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the figures of a step."""
        if "loss" not in (logs or {}):
            return
        step, rate = state.global_step, logs["learning_rate"]
        row = {
            "step": step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": rate,
            "gradient_norm": logs["grad_norm"],
            **self._trainer.measured,
        }
        self._metrics.write(row)
        self._trackers.write(row)
        if step == state.max_steps or step % max(1, state.max_steps // 20) == 0:
            print(
                f"[reward {self._job.run_name}] step {step}/{state.max_steps}  loss {row['loss']:.4f}  "
                f"right {row['accuracy']:.3f}",
                flush=True,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the manifest: only then the checkpoint counts."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._metrics.sync()
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        record = {"step": state.global_step, "plan": self._identity, "files": sizes}
        write_whole(folder / MANIFEST, json.dumps(record))

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        self._metrics.close()
        self._trackers.close(failed=error is not None)
