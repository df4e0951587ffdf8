"""The learning rate of a step: linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017) or constant."""

from __future__ import annotations

import math

from services.distill.config import DistillConfig


def learning_rate(config: DistillConfig, step: int, total_steps: int, *, stage: int = 0) -> float:
    """Return the learning rate of a step, counted from 0.

    One schedule goes over the whole run; a stage of a curriculum may have a peak of its own, which the schedule scales.
    The rate is a function of the step alone, so that no checkpoint stores it and a resumed run uses the same one.
    """
    peak = (config.stages[stage].learning_rate if config.stages else None) or config.learning_rate
    warmup = math.ceil(config.warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
