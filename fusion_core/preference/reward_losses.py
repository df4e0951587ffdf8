"""Losses of reward models: the plain ranking loss, and InternLM2's focal ranking loss with a barrier on the scores.

InternLM2 (arXiv:2403.17297, section 4.2) trains one reward model for wishes that contradict each other. With
p = sigmoid(r_chosen - r_rejected):

    ranking = -(1 - 2 max(0, p - 1/2))^gamma log p        a pair that is decided already counts less
    barrier = -(log(x + 5) + log(5 - x))                  for a score x: it stays within -5 and 5
    loss    = mean(ranking) + lambda mean(barrier)

with gamma 2 and lambda 0.02; gamma 0 and lambda 0 are the plain loss of Bradley and Terry.

Shape legend: B pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

BOUND = 5.0
"""Bound of the scores, on both sides."""
_EDGE = 0.01
"""Distance from the bound within which the barrier goes on as a straight line: a step of the optimiser may carry a
score beyond the bound, and from there the loss must lead back."""


def focal_ranking_loss(chosen_B: Tensor, rejected_B: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the ranking loss of every pair, [B]; with gamma 0 that of Bradley and Terry.

    The weight is computed from log(1 - p): 1 - 2 (p - 1/2) = 2 (1 - p), which keeps its digits where p is close to 1.
    """
    margin_B = chosen_B - rejected_B
    log_weight_B = gamma * (math.log(2) + logsigmoid(-margin_B)).clamp(max=0)
    return -torch.exp(log_weight_B) * logsigmoid(margin_B)


def score_barrier(scores_B: Tensor, bound: float = BOUND) -> Tensor:
    """Return the barrier of every score, [B]; nearer than 0.01 to the bound, and beyond it, its tangent."""
    limit = bound - _EDGE
    inside_B = scores_B.clamp(-limit, limit)
    slope = 2 * limit / (bound**2 - limit**2)
    return slope * relu(scores_B.abs() - limit) - torch.log(bound + inside_B) - torch.log(bound - inside_B)


def reward_loss(chosen_B: Tensor, rejected_B: Tensor, *, gamma: float = 2.0, barrier: float = 0.02) -> Tensor:
    """Return the loss of a batch: the mean of its pairs' ranking losses, and `barrier` times that of its scores'."""
    loss = focal_ranking_loss(chosen_B, rejected_B, gamma).mean()
    return loss + barrier * score_barrier(torch.cat([chosen_B, rejected_B])).mean() if barrier else loss
