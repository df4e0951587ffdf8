"""Supervised tuning: the loss is taken over the answers' tokens alone, their end included."""

from __future__ import annotations

from services.base.errors import SettingError
from services.posttrain.config import SftStage
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob
from services.posttrain.stages.parts import adapters, arguments, load_trl, run_to_end, start_model, tokenizer_of

_NO_LOSS = -100
"""The label of tokens without a loss."""


def train(job: StageJob) -> None:
    """Train the stage to its end; raises SettingError when no row fits into `max_length`."""
    trl = load_trl()
    stage = job.stage
    assert isinstance(stage, SftStage)
    trainer = trl.SFTTrainer(
        model=start_model(job),
        args=arguments(job, trl.SFTConfig, max_length=stage.max_length, packing=False),
        train_dataset=labelled_rows(job, stage.max_length),
        processing_class=tokenizer_of(job.start),
        peft_config=adapters(stage.lora),
    )
    run_to_end(job, trainer)


def labelled_rows(job: StageJob, max_length: int) -> object:
    """Return the rows in tokens, with labels on the answers' tokens; longer rows are left out."""
    from datasets import Dataset

    tokens = PromptTokens(job.start, job.config.chat_template)
    rows = []
    for row in job.rows():
        prompt_ids, answer_ids = tokens.with_answer(row["prompt"], row["completion"])
        if len(prompt_ids) + len(answer_ids) <= max_length:
            labels = [_NO_LOSS] * len(prompt_ids) + answer_ids
            rows.append({"input_ids": prompt_ids + answer_ids, "labels": labels})
    if not rows:
        raise SettingError("max_length", f"no row has at most {max_length} tokens")
    return Dataset.from_list(rows)
