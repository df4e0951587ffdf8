"""A dense target as a mixture of experts: transformers' models around `fusion_core.moe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusion_core.moe.router import tie_routers
from fusion_core.moe.upcycle import COPIES_KEY, Upcycling, check_dense, upcycled_config, upcycled_state
from services.distill.target.config import MoeConfig

_WITH_BIASES = {"deepseek_v3", "glm4_moe"}
_MIXTURES = {"qwen2_moe", "qwen3_moe", "mixtral", "olmoe"} | _WITH_BIASES
"""Types of models whose routers are known (see `RouterRecorder`); such a target needs no upcycling."""


def check_moe(folder: Path, moe: MoeConfig) -> None:
    """Raise ValueError as `check_mixture` does, for the target in a folder."""
    from transformers import AutoConfig

    check_mixture(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), moe)


def check_mixture(config: Any, moe: MoeConfig) -> None:
    """Raise ValueError, for a run with `distill.moe`, unless a target can become, or is, a mixture of experts.

    `config` is the target's configuration in transformers.
    """
    if moe.balance.bias and config.model_type not in _WITH_BIASES:
        made = "" if config.model_type in _MIXTURES else "; a mixture made of a dense target is a qwen2_moe"
        raise ValueError(
            f"distill.moe.balance.bias: only routers of {' and '.join(sorted(_WITH_BIASES))} have biases, the target "
            f"is a {config.model_type}{made}; leave it out or set 0"
        )
    if config.model_type in _MIXTURES:
        _check_groups(moe, getattr(config, "num_experts", None) or config.num_local_experts)
        if moe.upcycling != Upcycling():
            raise ValueError(
                "distill.moe: the target is a mixture of experts already, which keeps its shape; allowed is balance"
            )
        return
    try:
        check_dense(config.to_dict(), moe.upcycling)
    except ValueError as error:
        raise ValueError(f"distill.moe: {error}") from error
    _check_groups(moe, moe.upcycling.num_experts)


def _check_groups(moe: MoeConfig, num_experts: int) -> None:
    if num_experts % moe.balance.groups:
        raise ValueError(
            f"distill.moe.balance.groups: must divide the {num_experts} experts of a layer, got {moe.balance.groups}"
        )


def as_mixture(model: Any, moe: MoeConfig, *, seed: int) -> Any:
    """Return the target as a mixture of experts: upcycled, or as it is when it is one already."""
    return model if model.config.model_type in _MIXTURES else upcycle(model, moe.upcycling, seed=seed)


def upcycle(model: Any, upcycling: Upcycling, *, seed: int) -> Any:
    """Return the mixture that computes what the dense `model` does; weights that stay the same are shared with it.

    A model without memory (device `meta`) gives one without memory. Raises ValueError as `check_dense` does.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    dense: dict[str, Any] = model.config.to_dict()
    config = Qwen2MoeConfig(**upcycled_config(dense, upcycling), dtype=model.dtype)
    with torch.device("meta"):
        untyped: Any = Qwen2MoeForCausalLM
        made = untyped(config).to(model.dtype)
    if model.device.type != "meta":
        made.load_state_dict(upcycled_state(model.state_dict(), dense, upcycling, seed=seed), assign=True)
        made.tie_weights()
        # Frequencies of the positions are no weights: made anew on the device.
        made.model.rotary_emb = type(made.model.rotary_emb)(config).to(model.device)
        made.generation_config = model.generation_config
    return made.train(model.training)


def tie_copies(model: Any) -> None:
    """Make the routers of a split mixture train as one row a copy; others stay as they are."""
    copies = getattr(model.config, COPIES_KEY, None)
    if copies is not None:
        tie_routers(model, copies)
