"""Lambda, the share of causal language modelling in the loss: over the steps, and by the sources' reward.

    L = lambda * L_CLM + (1 - lambda) * L_fusion        FuseLLM (Wan et al. 2024), equation 5

The reference implementation of the paper has three ways to set lambda, with t of T steps taken and the reward
r = exp(-L_s) of the source s with the lowest loss L_s in nats per token (the probability that it gives a token, in the
geometric mean):

    hard             lambda                             here: constant
    hard and decay   lambda + (1 - lambda) * t / T      here: linear, to 1
    soft             1 - r                              here: constant 0, weighed by the reward

Here the two are independent: the schedule gives lambda(t), and with the reward a window's own lambda is
1 - (1 - lambda(t)) * r, so that a window on which every source does badly is learned from its text alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

LambdaSchedule = Literal["constant", "linear", "cosine"]


def lambda_at(schedule: LambdaSchedule, start: float, end: float, step: int, total_steps: int) -> float:
    """Return lambda of a step, counted from 0: `start` at the first, then towards `end`, which step `total_steps` would
    reach, linearly or along half a cosine; `constant` stays at `start`."""
    if schedule == "constant":
        return start
    progress = step / total_steps
    if schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * progress


def source_reward(nats_per_byte: Sequence[float], num_bytes: int, num_tokens: int) -> float:
    """Return exp(-loss) of the best source on a window, its loss in nats per token of the *target's* tokenisation.

    Sources' own tokens differ in length, so their losses per token do not compare; over the same bytes and the same
    target tokens they do. NaN stands for a source that took no part; without any, or without tokens, the reward is 0.
    """
    losses = [loss for loss in nats_per_byte if math.isfinite(loss)]
    if not losses or num_tokens == 0:
        return 0.0
    return math.exp(-max(0.0, min(losses)) * num_bytes / num_tokens)
