"""The losses of reward models against their formulas, written down with Python's own mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from fusion_core.preference.reward_losses import focal_ranking_loss, reward_loss, score_barrier

CHOSEN = [0.0, 1.5, -2.0, 4.9, -4.9, 0.3, 3.0]
REJECTED = [0.0, -1.0, 2.5, -4.9, 4.9, 0.4, 3.0]


def ranking(chosen: float, rejected: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(rejected - chosen))
    return -((1 - 2 * max(0.0, p - 0.5)) ** gamma) * math.log(p)


def barrier(x: float) -> float:
    return -(math.log(x + 5) + math.log(5 - x))


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(CHOSEN, dtype=dtype), torch.tensor(REJECTED, dtype=dtype)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_the_ranking_loss_is_the_formula(gamma: float) -> None:
    wanted = [ranking(c, r, gamma) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert focal_ranking_loss(*tensors(), gamma).tolist() == pytest.approx(wanted, abs=1e-9)
    assert focal_ranking_loss(*tensors(torch.float32), gamma).tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_barrier_is_the_formula_inside() -> None:
    scores = [-4.98, -3.0, 0.0, 2.2, 4.98]
    found = score_barrier(torch.tensor(scores, dtype=torch.float64)).tolist()
    assert found == pytest.approx(list(map(barrier, scores)), abs=1e-6)


def test_the_whole_loss_is_the_formula() -> None:
    pairs = list(zip(CHOSEN, REJECTED, strict=True))
    wanted = sum(ranking(c, r, 2) for c, r in pairs) / len(pairs)
    wanted += 0.02 * sum(map(barrier, CHOSEN + REJECTED)) / (2 * len(pairs))
    assert float(reward_loss(*tensors())) == pytest.approx(wanted, abs=1e-6)
    plain = sum(math.log1p(math.exp(r - c)) for c, r in pairs) / len(pairs)
    assert float(reward_loss(*tensors(), gamma=0, barrier=0)) == pytest.approx(plain, abs=1e-6)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    chosen, rejected = (torch.empty(6, dtype=torch.float64).uniform_(-4.5, 4.5).requires_grad_() for _ in range(2))
    assert gradcheck(reward_loss, (chosen, rejected))
    assert gradcheck(lambda c, r: focal_ranking_loss(c, r, 0.5), (chosen, rejected))
    far = torch.tensor([-7.0, -4.995, 4.995, 30.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(score_barrier, (far,))


def test_a_score_beyond_the_barrier_is_led_back() -> None:
    scores = torch.tensor([-1e6, -5.0, 5.0, 40.0], requires_grad=True)
    score_barrier(scores).sum().backward()
    assert scores.grad is not None
    assert scores.grad.sign().tolist() == [-1, -1, 1, 1]
    assert torch.isfinite(score_barrier(scores)).all()


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_far_margins_have_finite_gradients(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    focal_ranking_loss(chosen, torch.zeros(1)).sum().backward()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()
