"""The base of the rotary position embeddings (RoPE) of a target, which a curriculum may raise for longer windows.

A larger base turns the slowest dimensions more slowly, so that positions further apart stay distinct (Xiong et al.
2023, "Effective Long-Context Scaling of Foundation Models"; InternLM2 goes from 50,000 to 1,000,000).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_FREQUENCIES = ("inv_freq", "original_inv_freq")


def check_rope(model: Any) -> None:
    """Raise ValueError unless the model has one base that can be set, in its configuration and in its modules."""
    kind, parameters = model.config.model_type, getattr(model.config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not list(_rotary_modules(model)):
        raise ValueError(f"distill.stages.rope_theta: {kind} has no rotary position embeddings; leave it out")
    if "rope_theta" not in parameters or parameters.get("rope_type") != "default":
        raise ValueError(
            f"distill.stages.rope_theta: {kind} has bases of its own for kinds of layers, or scaled ones "
            f"(rope_parameters: {parameters}); allowed for models with one base and rope_type default"
        )


@torch.no_grad()
def set_rope_theta(model: Any, theta: float) -> None:
    """Set the base: in the configuration, which is saved with the model, and in the frequencies of its modules.

    `model` is one that `check_rope` takes; no weight changes.
    """
    model.config.rope_parameters["rope_theta"] = theta
    for module in _rotary_modules(model):
        made = type(module)(model.config)
        for name in _FREQUENCIES:
            if isinstance(frequencies := getattr(module, name, None), torch.Tensor) and not frequencies.is_meta:
                frequencies.copy_(getattr(made, name))


def _rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "compute_default_rope_parameters"):
            yield module
