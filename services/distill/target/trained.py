"""The target while it is trained: all of its weights, or adapters on frozen ones; and the saving of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.base.atomic import whole_folder
from services.distill.config import DistillConfig
from services.distill.target.lora import add_lora, save_adapter, save_merged
from services.distill.target.moe import as_mixture, tie_copies
from services.jobs.run_folder import RunFolder
from services.models.weights import check_head, check_savable, empty_model, load_model, save_model


class TrainedTarget:
    """A target ready to train, on the CPU.

    Attributes:
        model: the causal language model; with LoRA the adapters are inside of it.
        head_rows: rows of the lm_head, padding included.
    """

    def __init__(
        self,
        target_folder: Path,
        config: DistillConfig,
        *,
        restore_from: Path | None,
        empty: bool = False,
    ) -> None:
        """Load the target from its folder, or from the checkpoint in `restore_from`.

        An `empty` one has no weights: the worker of rank 0 sends them (see `parallelise`), and checks the model.
        """
        self._target_folder = target_folder
        self._peft_model: Any = None
        folder = target_folder if restore_from is None or config.lora is not None else restore_from
        self.model = empty_model(folder) if empty else load_model(folder)
        if config.moe is not None and restore_from is None:
            self.model = as_mixture(self.model, config.moe, seed=config.seed)
        tie_copies(self.model)
        if not empty:
            check_savable(self.model, target_folder)
        if config.lora is not None:
            adapter = None if empty else restore_from
            self._peft_model = add_lora(self.model, config.lora, seed=config.seed, adapter=adapter)
            if not empty:
                check_head(self.model)
        self.model.train()
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
