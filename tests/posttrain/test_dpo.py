"""The loss of LN-DPO against its formula, written out here over plain log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from services.posttrain.config import DpoStage
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.identity import identity_of
from services.posttrain.job import StageJob
from services.posttrain.stages.dpo import make_trainer
from tests.posttrain.scene import RIGHT, TRAINED, WRONG, Scene, question


def mean_logprob(model: torch.nn.Module, prompt_ids: list[int], answer_ids: list[int]) -> float:
    """The mean log-probability of an answer's tokens, one softmax after the other."""
    ids = prompt_ids + answer_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for place in range(len(prompt_ids), len(ids)):
        row = logits[place - 1]
        total += float(row[ids[place]]) - math.log(sum(math.exp(value) for value in row.tolist()))
    return total / len(answer_ids)


def test_sigmoid_norm_is_the_closed_form(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    config = scene.config({"kind": "dpo", "data": [scene.pairs], "loss_type": "sigmoid_norm", "beta": 5})
    job = StageJob("1-dpo", tmp_path / "stage", scene.start, config.stages[0], config, identity_of({}))
    job.folder.mkdir()
    words = TRAINED[:3]
    rows = [{"prompt": question(word), "chosen": RIGHT, "rejected": WRONG} for word in words]
    (job.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_trainer(job)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():  # away from the reference, where the loss is log 2 whatever it is
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    policy = trainer.model.eval()
    reference = AutoModelForCausalLM.from_pretrained(scene.start).eval()
    tokens = PromptTokens(scene.start, None)
    expected = []
    for word in words:
        margins = []
        for answer in (RIGHT, WRONG):
            ids = tokens.with_answer(question(word), answer)
            margins.append(mean_logprob(policy, *ids) - mean_logprob(reference, *ids))
        expected.append(math.log1p(math.exp(-5 * (margins[0] - margins[1]))))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(words))])
    loss = float(trainer.compute_loss(policy, batch).detach())
    assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert abs(loss - math.log(2)) > 1e-3


@pytest.mark.parametrize(("loss_type", "beta"), [("sigmoid_norm", 0.1), ("sigmoid", 5.0)])
def test_a_beta_of_the_other_scale_is_refused(loss_type: str, beta: float) -> None:
    with pytest.raises(ValidationError, match="scale of"):
        DpoStage.model_validate({"kind": "dpo", "data": ["x"], "loss_type": loss_type, "beta": beta})
