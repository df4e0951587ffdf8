"""Section `engine` of a source: which engine scores, and the settings of that engine alone.

    engine: {kind: vllm, dtype: bfloat16, engine_args: {enforce_eager: true}}

The short form names the kind, and its settings stand beside it among the source's own keys; `lift_flat_keys` moves
them into the section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from services.base.settings import Settings
from services.source.engines.endpoint.config import OpenAIConfig
from services.source.engines.identity import counted_arguments

OWN_VALUES = {"load_format": "safetensors"}  # vLLM would fall back on pickled weights
"""Arguments for vLLM that we set where the recipe does not."""


class ModelConfig(Settings):
    """Settings of every engine that loads a model."""

    kind: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    logits_memory_bytes: int = Field(
        2 * 1024**3,
        ge=1,
        description="Memory of a replica for float32 rows over the whole vocabulary; it bounds the engine's batch.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python files that the model's folder brings. Tokenizers run none in any case."
    )

    @property
    def counted(self) -> dict[str, Any]:
        """Settings that may change an answer, beside dtype and weights."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}


class VllmConfig(ModelConfig):
    """Engine `vllm`: vLLM in processes of its own."""

    kind: Literal["vllm"] = "vllm"
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed on to vllm.AsyncEngineArgs.")
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray places the workers of a replica that takes several GPUs."
    )

    @model_validator(mode="after")
    def _no_second_key(self) -> VllmConfig:
        if "trust_remote_code" in self.engine_args:
            raise ValueError("engine_args.trust_remote_code: is the source's own key trust_remote_code")
        return self

    @property
    def counted(self) -> dict[str, Any]:
        """Settings that may change an answer, beside dtype and weights."""
        return super().counted | counted_arguments(self.engine_args, OWN_VALUES)

    @property
    def num_workers(self) -> int:
        """The number of processes of a replica, each with a part of the model."""
        parallel = (self.engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        sizes = [int(size) for size in parallel]
        return sizes[0] * sizes[1]

    @property
    def workers_by_ray(self) -> bool:
        """True when workers are actors of Ray; with executor mp all of them run where the replica does."""
        return bool(self.engine_args.get("distributed_executor_backend", "ray") == "ray")


class TransformersConfig(ModelConfig):
    """Engine `transformers`: a plain forward pass in the replica's own process."""

    kind: Literal["transformers"] = "transformers"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    torch_threads: int | None = Field(None, ge=1, description="Threads of torch on CPU.")


class SyntheticConfig(Settings):
    """Engine `synthetic`: made-up distributions at a set pace, from the model folder's tokenizer alone."""

    kind: Literal["synthetic"] = "synthetic"
    tokens_per_second: float | None = Field(None, gt=0, description="Pace of the engine; null is as fast as it can.")
    delay_seconds: float = Field(0, ge=0, description="Added to every text's answer; other texts do not wait for it.")
    seed: int = Field(0, ge=0, description="Sources with different seeds predict differently.")


_AnyEngine: TypeAlias = VllmConfig | TransformersConfig | SyntheticConfig | OpenAIConfig
_KINDS: dict[str, type[_AnyEngine]] = {
    "vllm": VllmConfig,
    "transformers": TransformersConfig,
    "synthetic": SyntheticConfig,
    "openai": OpenAIConfig,
}
_FLAT_KEYS = {
    key: [kind for kind, section in _KINDS.items() if key in section.model_fields]
    for section in (VllmConfig, TransformersConfig)
    for key in section.model_fields
    if key != "kind"
}
"""Engine settings that the short form puts among the source's own keys, each with the engines that take it."""


def _section(value: Any) -> Any:
    """Validate a section by the model of its kind, so that errors name the keys without the kind before them."""
    if not isinstance(value, Mapping):
        return value if isinstance(value, Settings) else _kind(value).model_validate({})
    return _kind(value.get("kind", "vllm")).model_validate(value)


def _kind(value: Any) -> type[_AnyEngine]:
    if not isinstance(value, str) or value not in _KINDS:
        raise ValueError("Input should be 'vllm', 'transformers', 'synthetic' or 'openai'")
    return _KINDS[value]


EngineConfig: TypeAlias = Annotated[_AnyEngine, BeforeValidator(_section)]


def lift_flat_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's values with the engine's settings all in section `engine`.

    A key that the engine does not have is dropped when it is set to its default. Raises ValueError naming the key when
    it is set to something else, or when key and section differ.
    """
    lifted = dict(values)
    flat = {key: lifted.pop(key) for key in _FLAT_KEYS if key in lifted}
    made_up = _plain(lifted.pop("synthetic", {}))
    engine = _plain(lifted.get("engine", "vllm"))
    section = dict(engine) if isinstance(engine, Mapping) else {"kind": engine}
    kind = section.setdefault("kind", "vllm")
    if not isinstance(kind, str) or kind not in _KINDS:
        return lifted  # it is refused for its kind
    if not isinstance(made_up, Mapping):
        raise ValueError(f"synthetic: expected a section, got {made_up!r}")
    if kind == "synthetic":
        flat |= made_up
    elif made_up and SyntheticConfig.model_validate(made_up) != SyntheticConfig():
        raise ValueError("synthetic: only engine synthetic takes it")
    fields = _KINDS[kind].model_fields
    for key, value in flat.items():
        default = fields[key].get_default(call_default_factory=True) if key in fields else None
        if key in _FLAT_KEYS and key not in fields:
            _refuse_unless_default(key, value, kind)
        elif section.get(key, default) in (default, value):
            section[key] = value
        else:
            raise ValueError(f"{key}: {value!r}, but engine.{key} is {section[key]!r}; leave one of them out")
    return lifted | {"engine": section}


def _plain(value: Any) -> Any:
    if isinstance(value, _AnyEngine):
        return value.model_dump(exclude_unset=True) | {"kind": value.kind}
    return value


def _refuse_unless_default(key: str, value: Any, kind: str) -> None:
    kinds = _FLAT_KEYS[key]
    if value != _KINDS[kinds[0]].model_fields[key].get_default(call_default_factory=True):
        only = f"only engine {kinds[0]} takes it" if len(kinds) == 1 else f"engine {kind} loads no model"
        raise ValueError(f"{key}: {only}")
