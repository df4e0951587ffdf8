"""Models from local folders, as data: weights from safetensors only, and no code of the folder's unless it is trusted.

A pickle can run any code when it is read, and so can a model whose folder brings Python files of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_causal_lm(folder: Path | str, *, dtype: Any, trust_remote_code: bool = False, key: str | None = None) -> Any:
    """Return the causal language model of a Hugging Face folder.

    Args:
        folder: a local one; nothing is fetched.
        dtype: the argument of `from_pretrained`.
        trust_remote_code: whether Python files of the folder may be run.
        key: the recipe's key that allows it, for the message; None where no key does.

    Raises ValueError when the folder holds no such model, no safetensors, or code that is not trusted.
    """
    from transformers import AutoModelForCausalLM

    if not trust_remote_code:
        check_own_code(Path(folder), key)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {folder} cannot be loaded: {error}") from error


def check_own_code(folder: Path, key: str | None = None) -> None:
    """Raise ValueError for a folder that needs Python code of its own; `key` is the recipe's key that allows it."""
    if _needs_own_code(folder):
        remedy = f"{key}: true runs it" if key else "which is never run here"
        raise ValueError(f"model: {folder} brings Python code of its own; {remedy}")


def _needs_own_code(folder: Path) -> bool:
    """Return whether the folder names code of its own for a model that transformers itself does not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "auto_map" in config and config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
