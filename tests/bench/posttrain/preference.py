"""The loss of LN-DPO as TRL computes it, beside its formula in plain Python."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from services.posttrain.config import PosttrainConfig
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob
from services.posttrain.stages.dpo import make_trainer
from tests.fakes.tiny_model import WORDS, make_tiny_model

_BETA = 5.0
_CHOSEN, _REJECTED = "yes, it is", "no"


def loss_and_formula(folder: Path, num_pairs: int) -> tuple[float, float]:
    """Return TRL's loss of a batch, and the formula's, for a random model away from its reference."""
    start = make_tiny_model(folder / "start", vocabulary_size=300, seed=1)
    stage = {"kind": "dpo", "data": ["-"], "loss_type": "sigmoid_norm", "beta": _BETA}
    config = PosttrainConfig.model_validate({"stages": [stage], "gate": {"prompts": ["-"]}, "device": "cpu"})
    job = StageJob("1-dpo", folder / "stage", start, config.stages[0], config, "")
    job.folder.mkdir()
    prompts = [f"Is {word} a word? " for word in WORDS[:num_pairs]]
    rows = [{"prompt": prompt, "chosen": _CHOSEN, "rejected": _REJECTED} for prompt in prompts]
    (job.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer(job)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    policy, reference = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(start).eval()
    tokens, total = PromptTokens(start, None), 0.0
    for prompt in prompts:
        chosen, rejected = (
            _mean_logprob(policy, *ids) - _mean_logprob(reference, *ids)
            for ids in (tokens.with_answer(prompt, answer) for answer in (_CHOSEN, _REJECTED))
        )
        total += math.log1p(math.exp(-_BETA * (chosen - rejected)))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(num_pairs)])
    return float(trainer.compute_loss(policy, batch).detach()), total / num_pairs


def _mean_logprob(model: torch.nn.Module, prompt_ids: list[int], answer_ids: list[int]) -> float:
    ids = prompt_ids + answer_ids
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0].double().tolist()
    logprobs = [
        rows[place - 1][ids[place]] - math.log(sum(map(math.exp, rows[place - 1])))
        for place in range(len(prompt_ids), len(ids))
    ]
    return sum(logprobs) / len(logprobs)
