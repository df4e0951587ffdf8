"""The target while it is trained: all of its weights, or adapters on frozen ones; and the saving of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from services.base.atomic import whole_folder
from services.distill.config import DistillConfig
from services.distill.target.lora import add_lora, save_adapter, save_merged
from services.jobs.run_folder import RunFolder
from services.models.weights import check_head, check_savable, load_model, save_model


class TrainedTarget:
    """A target on its device, ready to train.

    Attributes:
        model: the causal language model; with LoRA the adapters are inside of it.
        head_rows: rows of the lm_head, padding included.
    """

    def __init__(
        self,
        target_folder: Path,
        config: DistillConfig,
        device: torch.device,
        *,
        restore_from: Path | None,
    ) -> None:
        """Load the target from its folder, or from the checkpoint in `restore_from`."""
        self._target_folder = target_folder
        self._peft_model: Any = None
        if config.lora is None:
            self.model = load_model(restore_from or target_folder)
            check_savable(self.model, target_folder)
        else:
            self.model = load_model(target_folder)
            check_savable(self.model, target_folder)
            self._peft_model = add_lora(self.model, config.lora, seed=config.seed, adapter=restore_from)
            check_head(self.model)
        self.model.to(device).train()
        self.head_rows = int(self.model.get_output_embeddings().weight.shape[0])
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def has_adapters(self) -> bool:
        """True when only LoRA adapters are trained."""
        return self._peft_model is not None

    def save(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """Write the model's part of a checkpoint: with LoRA the adapter, else all weights."""
        if self._peft_model is None:
            save_model(self.model, self._target_folder, folder, weights)
        else:
            assert weights is not None
            save_adapter(self._peft_model, folder, weights)

    def save_final(self, files: RunFolder, weights: dict[str, Any] | None) -> None:
        """Write the model into the run's folder, and with LoRA the adapter; each appears complete or not at all."""
        if self._peft_model is None:
            with whole_folder(files.model, replace=True) as made:
                self.save(made, weights)
            return
        with whole_folder(files.adapter, replace=True) as made:
            self.save(made, weights)
        with whole_folder(files.model, replace=True) as made:
            save_merged(self._target_folder, files.adapter, made)
