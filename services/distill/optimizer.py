"""The optimiser of a worker: AdamW with clipped gradients, over whole or sharded weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from services.distill.config import DistillConfig


class TargetOptimizer:
    """AdamW (Loshchilov and Hutter 2019) on all weights of `module` that are trained; vectors (norms, biases) are not
    decayed."""

    def __init__(self, module: nn.Module, config: DistillConfig) -> None:
        self._module, self._clip_norm = module, config.clip_norm
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas
        )

    def step(self, learning_rate: float) -> float:
        """Take a step with the accumulated gradients, and clear them; return their norm before clipping.

        A gradient that is not finite changes no weight.
        """
        parameters = [p for p in self._module.parameters() if p.grad is not None]
        norm_ = torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm or math.inf)
        norm = float(norm_.full_tensor() if isinstance(norm_, DTensor) else norm_)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(norm):
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm
