"""Sampled answers: by their seeds alone, in the model's own distribution."""

from __future__ import annotations

import pytest
import torch

from services.distill.on_policy.sampling import sample_ids
from services.models.weights import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

STOP = 2
PROMPTS = [[0, 40, 41], [0, 50], [0, 60, 61, 62, 63, 64], [0, 40, 41]]


@pytest.fixture(scope="module")
def model(target):
    model = load_model(target).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # far from even
    return model


def allowed(model) -> torch.Tensor:
    allowed_V = torch.ones(model.lm_head.weight.shape[0], dtype=torch.bool)
    allowed_V[:2] = False
    return allowed_V


def by_hand(model, prompt, seed, temperature, max_new_tokens):
    """One answer, without a cache and without padding."""
    draws = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = list(prompt)
    for draw in draws.tolist():
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        logits[~allowed(model)] = -torch.inf
        probs = torch.softmax(logits / temperature, dim=-1)
        token = next(token for token, total in enumerate(probs.cumsum(0).tolist()) if total > draw)
        ids.append(token)
        if token == STOP:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_answer_is_a_function_of_model_prompt_and_seed(model, temperature):
    settings = {"allowed_V": allowed(model), "stop_id": STOP, "temperature": temperature, "max_new_tokens": 10}
    seeds = [11, 12, 13, 14]
    model.train()
    answers = sample_ids(model, PROMPTS, seeds, at_once=3, **settings)
    assert model.training and sample_ids(model, PROMPTS[::-1], seeds[::-1], at_once=4, **settings)[::-1] == answers
    model.eval()
    assert answers == [by_hand(model, p, s, temperature, 10) for p, s in zip(PROMPTS, seeds, strict=True)]
    again = sample_ids(model, [PROMPTS[0]] * 20, range(20), at_once=20, **settings)
    assert len(set(map(tuple, again))) > 1


def test_answers_come_as_often_as_the_model_says(model):
    prompt, count = [0, 40, 41], 4000
    settings = {"allowed_V": allowed(model), "stop_id": STOP, "temperature": 1.0, "max_new_tokens": 1}
    first = [ids[0] for ids in sample_ids(model, [prompt] * count, range(count), at_once=2000, **settings)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    logits[~allowed(model)] = -torch.inf
    probs = torch.softmax(logits, dim=-1)
    shares = torch.bincount(torch.tensor(first), minlength=probs.shape[0]) / count
    assert float((shares - probs).abs().sum()) < 2 * (2 / torch.pi * probs * (1 - probs) / count).sqrt().sum()
