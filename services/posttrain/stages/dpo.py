"""Preference tuning by DPO, with the loss of TÜLU 3 (arXiv:2411.15124) as the default:

    -log sigmoid(beta * ((log pi(c) - log ref(c)) / |c| - (log pi(r) - log ref(r)) / |r|))

for the chosen answer c and the rejected answer r. The reference is loaded from the folder that the stage starts from.
"""

from __future__ import annotations

from typing import Any

from services.base.errors import SettingError
from services.posttrain.config import DpoStage
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob
from services.posttrain.stages.parts import adapters, arguments, load_trl, run_to_end, start_model, tokenizer_of


def train(job: StageJob) -> None:
    """Train the stage to its end; raises SettingError when no pair fits into `max_length`."""
    run_to_end(job, make_trainer(job))


def make_trainer(job: StageJob) -> Any:
    """Return TRL's trainer, on pairs that are in tokens already."""
    trl: Any = load_trl()
    stage = job.stage
    assert isinstance(stage, DpoStage)

    class PairTrainer(trl.DPOTrainer):  # type: ignore[misc]  # TRL's types are not read
        """TRL's trainer without its own tokenisation, which reads control tokens in what users wrote."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return PairTrainer(
        model=start_model(job),
        ref_model=None if stage.lora is not None else start_model(job),
        args=arguments(job, trl.DPOConfig, max_length=stage.max_length, beta=stage.beta, loss_type=[stage.loss_type]),
        train_dataset=pairs_in_tokens(job, stage.max_length),
        processing_class=tokenizer_of(job.start),
        peft_config=adapters(stage.lora),
    )


def pairs_in_tokens(job: StageJob, max_length: int) -> Any:
    """Return the pairs as ids of prompt, chosen and rejected answer; pairs with a longer side are left out."""
    from datasets import Dataset

    tokens = PromptTokens(job.start, job.config.chat_template)
    rows = []
    for row in job.rows():
        prompt_ids, chosen_ids = tokens.with_answer(row["prompt"], row["chosen"])
        rejected_prompt_ids, rejected_ids = tokens.with_answer(row["prompt"], row["rejected"])
        # Some tokenizers split the white space before an answer by its first word: what is common is the prompt.
        common = _common(prompt_ids, rejected_prompt_ids)
        chosen_ids, rejected_ids = prompt_ids[common:] + chosen_ids, rejected_prompt_ids[common:] + rejected_ids
        if common + max(len(chosen_ids), len(rejected_ids)) <= max_length:
            ids = {"prompt_ids": prompt_ids[:common], "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            rows.append(ids)
    if not rows:
        raise SettingError("max_length", f"no pair has at most {max_length} tokens on both sides")
    return Dataset.from_list(rows)


def _common(one: list[int], other: list[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
