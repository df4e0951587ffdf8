"""InternLM2's config.json, and the Llama configuration of the same model.

The two architectures differ in the names and the storage of tensors only. `bias` stands for a bias in both matrices of
the attention and in no other, which is Llama's `attention_bias`. RoPE scaling `linear` and `dynamic` have the same
formulas in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

CONFIG = "config.json"
_PUBLISHED, _LLAMA = "InternLM2ForCausalLM", "LlamaForCausalLM"
_SAME_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
_PASSED_KEYS = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "torch_dtype")
"""Keys that decide no number, taken over where they are."""


class RopeScaling(BaseModel):
    """Scaling of the rotary embedding; the two kinds that InternLM2 has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["linear", "dynamic"]
    factor: float = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _second_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "rope_type" in values:  # the name of later versions of transformers
            values = {"type": values["rope_type"], **values}
            del values["rope_type"]
        return values


class InternLM2Config(BaseModel):
    """The keys of InternLM2's config.json that decide shapes and numbers, with the published defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_type: Literal["internlm2"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: float = Field(1e-6, gt=0)
    bias: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = Field(10_000, gt=0)
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def group(self) -> int:
        """The number of query heads that share a key and a value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @model_validator(mode="before")
    @classmethod
    def _one_group_a_head(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_key_value_heads") is None:
            values = {**values, "num_key_value_heads": values.get("num_attention_heads")}
        return values

    @model_validator(mode="after")
    def _heads_fit(self) -> InternLM2Config:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} gives {self.num_attention_heads} heads no even width")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        return self


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raises ValueError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return values


def read_config(folder: Path) -> tuple[dict[str, Any], InternLM2Config]:
    """Return config.json of an InternLM2 folder as it is, and checked; raises ValueError naming the key."""
    values = read_json(folder / CONFIG)
    where = folder / CONFIG
    if values.get("model_type") != "internlm2":
        raise ValueError(
            f"{where}: model_type is {values.get('model_type')!r}, which is no InternLM2; expected internlm2"
        )
    if _PUBLISHED not in values.get("architectures", [_PUBLISHED]):
        raise ValueError(f"{where}: architectures is {values['architectures']}, supported is {_PUBLISHED}")
    if "quantization_config" in values:
        raise ValueError(f"{where}: quantization_config: quantised weights are not supported")
    try:
        return values, InternLM2Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from error


def llama_config(values: dict[str, Any], config: InternLM2Config) -> dict[str, Any]:
    """Return the config.json of the same model as a Llama."""
    scaling = config.rope_scaling
    passed = {"torch_dtype": values["dtype"]} if "dtype" in values else {}
    return {
        "architectures": [_LLAMA],
        "model_type": "llama",
        **{key: getattr(config, key) for key in _SAME_KEYS},
        "head_dim": config.head_dim,
        "attention_bias": config.bias,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": scaling.type, "factor": scaling.factor} if scaling else None,
        **passed,
        **{key: values[key] for key in _PASSED_KEYS if key in values},
    }


def published_config(folder: Path, original: dict[str, Any]) -> dict[str, Any]:
    """Return InternLM2's config.json of a Llama folder: `original` with the keys that have another value now.

    Raises ValueError for a model that InternLM2's code cannot express, naming the key.
    """
    from transformers import LlamaConfig

    where = folder / CONFIG
    if (found := read_json(where).get("model_type")) != "llama":
        raise ValueError(f"{where}: model_type is {found!r}, expected llama")
    llama = LlamaConfig.from_pretrained(folder, local_files_only=True)
    if llama.mlp_bias:
        raise ValueError(f"{where}: mlp_bias is true, and InternLM2 has no bias there")
    if llama.head_dim != llama.hidden_size // llama.num_attention_heads:
        raise ValueError(
            f"{where}: head_dim {llama.head_dim} is not hidden_size / num_attention_heads, as in InternLM2"
        )
    rope: Any = dict(llama.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10_000.0), rope.pop("rope_type", "default")
    values = {
        "model_type": "internlm2",
        **{key: getattr(llama, key) for key in _SAME_KEYS},
        "bias": llama.attention_bias,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
    }
    try:
        now, before = InternLM2Config.model_validate(values), InternLM2Config.model_validate(original)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}, as in InternLM2") from error
    changed = {key: values[key] for key in values if getattr(now, key) != getattr(before, key)}
    dtype = str(llama.dtype or "").removeprefix("torch.")
    if dtype and dtype != original.get("torch_dtype", original.get("dtype")):
        changed["torch_dtype"] = dtype
    return original | changed
