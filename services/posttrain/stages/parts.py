"""The parts of all stages: TRL's arguments, the log, checkpoints that count once they are whole, the final model."""

from __future__ import annotations

import importlib
import json
import logging
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.base.atomic import whole_folder, write_whole
from services.base.errors import SettingError
from services.distill.target.config import LoraConfig
from services.jobs.step_log import StepLog, read_rows
from services.jobs.storage import MANIFEST, newest_complete
from services.jobs.tracking import Trackers
from services.models.pretrained import load_causal_lm
from services.models.weights import quiet, save_model
from services.posttrain.job import StageJob

logger = logging.getLogger(__name__)
_STOPPED = "stopped.json"


def require_extra() -> None:
    """Raise SettingError when the packages that post-training takes are not installed."""
    if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
        raise SettingError("stages", f"{missing[0]} is not installed; the extra `posttrain` has it")


def load_trl() -> Any:
    """Return TRL, imported without vLLM: stages generate with transformers, and importing vLLM takes half a minute."""
    require_extra()
    import datasets
    from trl import import_utils

    datasets.disable_progress_bars()
    found = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda *_, **__: False
    try:
        trl: Any = importlib.import_module("trl")
        for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer"):
            getattr(trl, name)  # each is imported when it is first named
    finally:
        import_utils.is_vllm_available = found
    return trl


def arguments(job: StageJob, kind: Any, **own: Any) -> Any:
    """Return TRL's arguments of a stage; `own` are those of its kind."""
    import torch

    stage = job.stage
    names = (
        *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_grad_norm", "seed"),
        *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "save_steps"),
        *("save_total_limit", "bf16", "gradient_checkpointing"),
    )
    made = kind(
        output_dir=str(job.files.checkpoints),
        **{name: getattr(stage, name) for name in names},
        **own,
        use_cpu=job.config.device == "cpu" or not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made._n_gpu = min(made.n_gpu, 1)  # else one process would spread its batch over all GPUs, and multiply it
    return made


def start_model(job: StageJob) -> Any:
    """Return the model that the stage starts from, in float32."""
    import torch

    with quiet():
        return load_causal_lm(job.start, dtype=torch.float32)


def adapters(lora: LoraConfig | None) -> Any:
    """Return peft's configuration of the adapters; None where all weights are trained."""
    if lora is None:
        return None
    import peft

    targets = lora.target_modules
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides by the rank in floating point
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer that TRL pads with and stores in checkpoints; rows come to it in tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def run_to_end(job: StageJob, trainer: Any, *, stop_rules: Any = None) -> None:
    """Train from the newest whole checkpoint to the end, and save the model into the stage's folder."""
    from transformers import PrinterCallback

    newest = newest_complete(job.files.checkpoints)
    after_step = newest.step if newest is not None else 0
    first = bool(trainer.is_world_process_zero())
    if first:
        (job.folder / _STOPPED).unlink(missing_ok=True)  # of an attempt whose model was not saved
    if stop_rules is not None and after_step:
        for row in read_rows(job.files.metrics):
            if row["step"] <= after_step:
                stop_rules.after_step(row)
    trainer.remove_callback(PrinterCallback)  # it prints every step's metrics as a dictionary
    with ExitStack() as stack:
        logs = None
        if first:
            log = stack.enter_context(closing(StepLog(job.files.metrics, after_step=after_step)))
            name = f"{job.folder.parent.name}/{job.name}"
            logs = log, stack.enter_context(Trackers(job.tracking, name, job.files, after_step=after_step))
        trainer.add_callback(_callback(job, logs, stop_rules=stop_rules))
        checkpoint = None if newest is None else str(Path(newest.location) / newest.name)
        trainer.train(resume_from_checkpoint=checkpoint)
    if first:
        _save(job, trainer.accelerator.unwrap_model(trainer.model))


def _save(job: StageJob, model: Any) -> None:
    if job.stage.lora is not None:
        with whole_folder(job.files.adapter, replace=True) as made:
            model.save_pretrained(str(made))
        model = model.merge_and_unload()
    with whole_folder(job.files.model, replace=True) as made:
        save_model(model, job.start, made)


def _callback(job: StageJob, logs_of_first: tuple[StepLog, Trackers] | None, *, stop_rules: Any) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Writes every step's metrics, marks whole checkpoints, and ends the run where a stop rule says so."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            if stop_rules is not None and (reason := stop_rules.after_step(numbers)) is not None:
                control.should_training_stop = True
                if logs_of_first is not None:
                    write_whole(job.folder / _STOPPED, json.dumps({"step": state.global_step, "reason": reason}))
                    logger.warning("%s: ends after step %d: %s", job.name, state.global_step, reason)
            if logs_of_first is None:
                return
            for each in logs_of_first:
                each.write({"step": state.global_step, **numbers})
            print(f"[posttrain {job.name}] step {state.global_step}/{state.max_steps} loss {logs['loss']}", flush=True)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if logs_of_first is None:
                return
            logs_of_first[0].sync()
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {
                path.relative_to(folder).as_posix(): path.stat().st_size
                for path in folder.rglob("*")
                if path.is_file() and path.name != MANIFEST
            }
            manifest = {"step": state.global_step, "plan": job.identity, "files": sizes}
            write_whole(folder / MANIFEST, json.dumps(manifest))

    return Progress()
