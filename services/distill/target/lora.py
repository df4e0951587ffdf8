"""LoRA adapters by peft: added, saved, and merged into a folder that needs no peft."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from services.distill.target.config import LoraConfig
from services.models.weights import load_model, save_model

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""The value of `target_modules` that reaches every linear layer but the lm_head, and the experts of a mixture."""
_EXPERTS = {"qwen2_moe": ["experts.gate_up_proj", "experts.down_proj"]}
"""Weights of experts that peft's all-linear leaves out, by type of model; it knows those of other types itself."""
_PREFIX = "base_model.model."
"""Prefix of the names of weights inside peft's model."""


def add_lora(model: Any, config: LoraConfig, *, seed: int, adapter: Path | None) -> Any:
    """Freeze `model` and put adapters into it: those of the folder `adapter`, or new ones.

    Returns peft's model around it; the given one computes with the adapters from now on. Raises ValueError when the
    model has no such layers, or when an adapter on the embeddings would change the lm_head as well.
    """
    import peft

    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    tied = _are_tied(model)
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank in floating point
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=_EXPERTS.get(model.config.model_type) if targets == ALL_LINEAR else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same adapters on all workers
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ValueError(f"distill.lora.target_modules: {error}") from error
    if tied and any(map(_has_adapter, (model.get_input_embeddings(), model.get_output_embeddings()))):
        raise ValueError(
            "distill.lora.target_modules: embeddings and lm_head of this model are one matrix, and adapters on it "
            "would act once as an adapter and twice in the merged model; leave both out"
        )
    if without := experts_without_adapters(model):
        logger.warning(
            "distill.lora: the experts have no adapters and stay as they are: %s; target_modules all-linear reaches "
            "those that peft knows",
            ", ".join(without),
        )
    return adapted


def experts_without_adapters(model: Any) -> list[str]:
    """Return the names of expert weights (three-dimensional parameters) without adapters, layer numbers as `*`."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if _has_adapter(module))
    names = [name for name, weight in model.named_parameters() if weight.ndim == 3 and not name.startswith(adapted)]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _has_adapter(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _are_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def save_adapter(adapted: Any, folder: Path, weights: dict[str, Any]) -> None:
    """Write the adapter's configuration and `weights`, those of the model inside, under peft's names."""
    adapted.save_pretrained(str(folder), state_dict={_PREFIX + name: value for name, value in weights.items()})


def save_merged(target_folder: Path, adapter: Path, folder: Path) -> None:
    """Write the target with the adapter added to its weights: an ordinary Hugging Face folder."""
    import peft

    merged = peft.PeftModel.from_pretrained(load_model(target_folder), str(adapter)).merge_and_unload()
    save_model(merged, target_folder, folder)
