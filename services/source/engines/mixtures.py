"""Models, most of them mixtures of experts, that an engine loads without an error and computes otherwise than their
authors meant."""

from __future__ import annotations

import json
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
    if config.engine.kind == "vllm" and settings.get("model_type") in _LATENT:
        _check_latent(config, settings)


def _check_latent(config: SourceConfig, settings: dict[str, Any]) -> None:
    kind = settings["model_type"]
    if config.num_gpus == 0:
        raise SettingError(
            "model",
            f"{config.model}: a {kind} has latent attention, for which vLLM on a CPU gives numbers that are not the "
            "model's (seen with deepseek_v2, with and without VLLM_MLA_DISABLE); give the source GPUs (num_gpus), or "
            "use engine transformers",
        )
    if kind == "deepseek_v3" and settings.get("topk_method") != "noaux_tc":
        raise SettingError(
            "model",
            f"{config.model}: vLLM reads the biases of a deepseek_v3's routers only with topk_method: noaux_tc in "
            "config.json, which transformers leaves out; write it there, or use engine transformers",
        )
