"""Models, most of them mixtures of experts, that an engine loads without an error and computes otherwise than their
authors meant."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.base.errors import SettingError
from services.source.config import SourceConfig


@dataclass(frozen=True, slots=True)
class _Fault:
    """A value in `config.json` that engines do not honour.

    Attributes:
        model_type, key: of config.json.
        value: the one that is not honoured.
        default: the value of a `config.json` without the key.
        engines: kinds of engines that are refused.
        reason: what they do instead, and the way out.
    """

    model_type: str
    key: str
    value: bool
    default: bool
    engines: tuple[str, ...]
    reason: str


_FAULTS = (
    _Fault(
        "qwen2_moe", "qkv_bias", False, True, ("vllm",),
        "vLLM reads biases of queries, keys and values that the folder does not have, and scores NaN; write zero "
        "biases into the folder and set it to true, or use engine transformers",
    ),
    _Fault(
        "olmoe", "norm_topk_prob", True, False, ("vllm",),
        "vLLM does not divide the weights of a token's experts by their sum, as the model does; use engine "
        "transformers",
    ),
    _Fault(
        "deepseek_v2", "norm_topk_prob", True, False, ("vllm", "transformers"),
        "vLLM divides the weights of a token's experts by their sum and transformers does not, so that the two engines "
        "score differently",
    ),
)  # fmt: skip


_LATENT = {"deepseek_v2", "deepseek_v3"}
"""Types of models with attention over a latent state."""
_ORDINARY_ATTENTION = "VLLM_MLA_DISABLE"
"""Variable with which vLLM computes latent attention by its ordinary kernels."""


def check_mixture(config: SourceConfig, folder: Path) -> None:
    """Raise SettingError naming `model` when the source's engine would compute another function than the folder's."""
    path = folder / "config.json"
    if config.engine.kind not in {"vllm", "transformers"} or not path.is_file():
        return
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for fault in _FAULTS:
        if settings.get("model_type") == fault.model_type and config.engine.kind in fault.engines:
            value = settings.get(fault.key)
            if (fault.default if value is None else bool(value)) == fault.value:
                shown = json.dumps(fault.value)
                raise SettingError("model", f"{config.model}: {fault.key}: {shown} in config.json: {fault.reason}")
    on_cpu = config.engine.kind == "vllm" and config.num_gpus == 0
    if on_cpu and settings.get("model_type") in _LATENT and not _has_ordinary_attention(config):
        raise SettingError(
            "model",
            f"{config.model}: on a CPU vLLM's kernels for the latent attention of {settings['model_type']} give other "
            f'numbers than the model; set env: {{{_ORDINARY_ATTENTION}: "1"}} of the source, give it GPUs (num_gpus), '
            "or use engine transformers",
        )


def _has_ordinary_attention(config: SourceConfig) -> bool:
    return {**os.environ, **config.env}.get(_ORDINARY_ATTENTION) == "1"
