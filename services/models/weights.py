"""Load and save causal language models as Hugging Face folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.models.pretrained import load_causal_lm

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.model", "vocab*", "merges.txt", "chat_template*")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars out of the logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from a local Hugging Face folder; raises ValueError when it cannot be used here."""
    with quiet():
        model = load_causal_lm(folder, dtype=dtype)
    check_head(model)
    return model


def save_model(model: Any, tokenizer_folder: Path, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Writes weights, configuration and the tokenizer's files as they are in `tokenizer_folder`.

    `weights`: the model's own when not set; where it is sharded, what was gathered from all workers.
    """
    with quiet():
        model.save_pretrained(folder, state_dict=weights)
    for pattern in _TOKENIZER_FILES:
        for file in tokenizer_folder.glob(pattern):
            if file.name != "target.json":
                shutil.copy2(file, folder / file.name)


def check_head(model: Any) -> None:
    """Raises ValueError unless logits are a plain matrix product of the last hidden states.

    The loss is computed from the lm_head's weight, without the model's own forward pass over it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"target.model: the lm_head of {model.config.model_type} is no plain matrix (it has a bias or an adapter), "
            "which is not supported"
        )
    text_config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, name, None) not in {None, 1}:
            raise ValueError(f"target.model: {name} = {getattr(text_config, name)} in config.json is not supported")
