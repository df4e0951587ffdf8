"""LoRA adapters by peft: put on, saved, and merged into a folder that needs no peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from services.distill.target.config import LoraConfig
from services.models.weights import load_model, save_model

_PREFIX = "base_model.model."


def add_lora(model: Any, config: LoraConfig, *, seed: int, adapter: Path | None) -> Any:
    """Freezes `model` and puts adapters into it: those of the folder `adapter`, or new ones.

    Returns peft's model around it; the given one computes with the adapters from now on. Raises ValueError when the
    model has no such layers.
    """
    import peft

    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank in floating point
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same adapters on all workers
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ValueError(f"distill.lora.target_modules: {error}") from error


def save_adapter(adapted: Any, folder: Path, weights: dict[str, Any]) -> None:
    """Writes the adapter's configuration and weights, as peft names them. `weights`: those of the model inside."""
    adapted.save_pretrained(str(folder), state_dict={_PREFIX + name: value for name, value in weights.items()})


def save_merged(target_folder: Path, adapter: Path, folder: Path) -> None:
    """Writes the target with the adapter added to its weights: an ordinary Hugging Face folder."""
    import peft

    merged = peft.PeftModel.from_pretrained(load_model(target_folder), str(adapter)).merge_and_unload()
    save_model(merged, target_folder, folder)
