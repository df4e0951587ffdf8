"""The learning rate of a step: linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017) or constant."""

from __future__ import annotations

import math

from services.distill.config import DistillConfig


def learning_rate(config: DistillConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It is a function of the step alone, so that no checkpoint stores it and a resumed run uses the same one.
    """
    warmup = math.ceil(config.warmup_share * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
