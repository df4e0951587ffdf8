"""Configuration of one source: a model, the engine that scores with it, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from services.base.settings import MEMORY_PATTERN, Settings
from services.models.chat_template import read_chosen
from services.models.tool_calls import ToolFormat
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN
from services.source.engines.config import EngineConfig, ModelConfig, VllmConfig, lift_flat_keys
from services.source.engines.identity import counted_variables, engine_name

MAX_TOP_K = 1024


class CanaryConfig(Settings):
    """Built-in texts that are scored at an interval: a broken model is noticed, and serves nothing more."""

    interval_seconds: float | None = Field(300, gt=0, description="Time between two checks; null checks at start only.")
    tolerance_nats: float = Field(
        0.05, gt=0, description="Largest mean drift of a token's log-probability from the first run's."
    )


class GenerationConfig(Settings):
    """Limits of the answers that a request may ask for."""

    max_new_tokens: int = Field(1024, ge=1, description="Most new tokens of an answer; no more than max_tokens anyway.")
    max_answers: int = Field(16, ge=1, le=1024, description="Most answers to one prompt.")
    tool_format: ToolFormat | None = Field(
        None, description="How the model writes calls of tools, where its chat template does not say so."
    )


class AutoscalingConfig(Settings):
    """Bounds within which Serve adds and removes replicas, so that each holds about `target_ongoing_requests`."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(4, gt=0, description="Calls and streams per replica to aim at.")
    upscale_delay_seconds: float = Field(30, ge=0)
    downscale_delay_seconds: float = Field(600, ge=0)

    @model_validator(mode="after")
    def _check(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must be at most max_replicas ({self.max_replicas})")
        return self


class _Source(Settings):
    """Keys of every source."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="Name of the Serve application.")
    model: str = Field(min_length=1, description="Name of a fetched model, or a local folder.")
    top_k: int = Field(64, ge=1, le=MAX_TOP_K, description="Candidates per token asked for by the fusion service.")
    eos_token: str | None = Field(
        None, description="Token that ends a document, for the end row; default the tokenizer's EOS."
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="How the model writes conversations: `model` (its own template), `plain`, `internlm2`, a file with "
        "a Jinja template, or its text. Default `model` where the corpus holds conversations, else none is taken.",
    )
    max_tokens: int = Field(
        2047,
        ge=1,
        description="Longest text in tokens, left context and EOS included; one more is kept for BOS. Windows are "
        "planned for it; with an address it says what the source there takes.",
    )

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        return read_chosen(value)


class SourceConfig(_Source):
    """A source that is deployed: the arguments of its Serve application."""

    address: ClassVar[None] = None
    engine: EngineConfig = VllmConfig()
    max_top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="Largest top_k that is served; default top_k.")
    bos_token: str | None = Field(
        None, description="Token put in front of every text; default the tokenizer's BOS, else its EOS."
    )
    max_text_bytes: int = Field(32_768, ge=1, description="Longest text in bytes, left context included.")
    per_client: PerClient = Field(
        PerClient(streams=256, blocks=16_384),
        description="What one client may hold: a replica of the fusion service asks for all trainers that it serves.",
    )
    max_tokens_in_flight: int | None = Field(
        None,
        ge=1,
        description="Tokens handed to the engine at once; default two batches of what logits_memory_bytes holds.",
    )
    canary: CanaryConfig = Field(CanaryConfig(), description="Checks on the model while it serves.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Limits of answers.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")

    num_replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingConfig | None = Field(None, description="Instead of a fixed num_replicas.")
    num_cpus: float = Field(1, ge=0, description="Logical CPUs of a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica, all its tensor parallel workers together.")
    memory: str | None = Field(
        None, pattern=MEMORY_PATTERN, description="Memory of a pod on Kubernetes, such as 48Gi; default the manifests'."
    )
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")

    @model_validator(mode="wrap")
    @classmethod
    def _lift_flat_keys(cls, values: Any, handler: ModelWrapValidatorHandler[SourceConfig]) -> SourceConfig:
        if not isinstance(values, Mapping):
            return handler(values)
        if values.get("address") is not None:
            raise ValueError("address: a source with an address is not deployed")
        if values.get("application") is not None:
            raise ValueError("application goes with address; a source that is deployed is named by `name`")
        lifted = lift_flat_keys({key: values[key] for key in values if key not in {"address", "application"}})
        try:
            return handler(lifted)
        except ValidationError as error:
            raise _named_as_given(error, values) from None

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if self.max_top_k is not None and self.max_top_k < self.top_k:
            raise ValueError(f"max_top_k ({self.max_top_k}) must be at least top_k ({self.top_k})")
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError("num_replicas: autoscaling decides it")
        if self.max_tokens_in_flight is not None and self.max_tokens_in_flight <= self.max_tokens:
            raise ValueError("max_tokens_in_flight must be above max_tokens, or the longest text could never run")
        if self.max_tokens_in_flight is not None and self.engine.kind == "transformers":
            default = type(self.engine).model_fields["logits_memory_bytes"].default
            if self.engine.logits_memory_bytes != default:
                raise ValueError("logits_memory_bytes: max_tokens_in_flight is set and takes its place")
        if self.engine.kind == "vllm":
            self._check_workers(self.engine)
        return self

    def _check_workers(self, engine: VllmConfig) -> None:
        if engine.num_workers > 1 and self.num_gpus not in {0, engine.num_workers}:
            raise ValueError(
                f"num_gpus: engine_args ask for {engine.num_workers} workers (tensor_parallel_size times "
                f"pipeline_parallel_size), a GPU each; got {self.num_gpus:g}"
            )
        if engine.placement_strategy != "PACK" and not self.places_workers:
            raise ValueError("placement_strategy: only a replica that takes several GPUs is placed")

    def says_more(self, key: str) -> bool:
        """Return whether a key of a source, or one of its engine's, is set to something else than its default."""
        if self.engine.kind == "openai" and key == "engine":  # its URL has no default
            return True
        engine = self.engine if self.engine.kind == "openai" else type(self.engine)()
        plain = type(self)(name=self.name, model=self.model, engine=engine)
        if key in {"engine", "synthetic"}:
            return self.engine != plain.engine
        mine, default = (self, plain) if key in type(self).model_fields else (self.engine, plain.engine)
        return bool(getattr(mine, key, None) != getattr(default, key, None))

    @property
    def largest_top_k(self) -> int:
        return self.max_top_k or self.top_k

    @property
    def application_name(self) -> str:
        return self.name

    @property
    def weights_here(self) -> bool:
        """True when the folder that `model` names has the weights that are served, and not the tokenizer alone."""
        return self.engine.kind != "openai"

    @property
    def dtype(self) -> str:
        """The type that the model is asked to compute in; `auto` leaves it to the model's folder."""
        return self.engine.dtype if isinstance(self.engine, ModelConfig) else "auto"

    @property
    def counted(self) -> dict[str, Any]:
        """Settings of the engine that change the model's numbers, beside dtype and weights."""
        match self.engine.kind:
            case "vllm":
                return self.engine.counted | counted_variables(self.env)
            case "synthetic":  # its table depends on the number of candidates
                return {"seed": self.engine.seed, "candidates": self.largest_top_k}
            case _:
                return self.engine.counted

    @property
    def engine_name(self) -> str:
        """The name of the engine in stored windows: with the settings that change its answers, without its version."""
        return engine_name(self.engine.kind, self.counted)

    @property
    def num_workers(self) -> int:
        """The number of processes of a replica, each with a part of the model."""
        return self.engine.num_workers if self.engine.kind == "vllm" else 1

    @property
    def places_workers(self) -> bool:
        """True when Ray places the workers one by one; with executor mp all of them run where the replica does."""
        engine = self.engine
        return engine.kind == "vllm" and engine.num_workers > 1 and self.num_gpus > 0 and engine.workers_by_ray

    @property
    def placement_strategy(self) -> str:
        """Ray's strategy for placing the workers of a replica."""
        return self.engine.placement_strategy if self.engine.kind == "vllm" else "PACK"

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas


class SourceAtAddress(_Source):
    """A source that runs already and is used by its address."""

    bos_token: ClassVar[None] = None

    address: str = Field(
        pattern=ADDRESS_PATTERN,
        description="host:port of a source that runs already; grpcs://host:port with TLS.",
    )
    application: str | None = Field(
        None, pattern=r"^[!-~]+$", description="Serve application at that address; default the name."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_of_a_deployment(cls, values: Any) -> Any:
        """Drop keys of a deployed source that are set to their default; raises ValueError naming one that is not."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        others = {key: value for key, value in values.items() if key not in own}
        deployed = SourceConfig.model_validate({"name": "s", "model": "m", "top_k": 1, "max_tokens": 1} | others)
        for key, value in others.items():
            is_short_form = key == "engine" and isinstance(value, str)
            if not is_short_form and deployed.says_more(key):
                raise ValueError(f"{key}: leave it out with address: the source runs already")
        return own

    @property
    def application_name(self) -> str:
        return self.application or self.name


def parse_source(values: Any) -> Any:
    """Return the source that the values describe, by whether they have an address; raises ValidationError."""
    if not isinstance(values, Mapping):
        return values
    kind = SourceConfig if values.get("address") is None else SourceAtAddress
    return kind.model_validate(values)


AnySource: TypeAlias = Annotated[SourceConfig | SourceAtAddress, BeforeValidator(parse_source)]


def _named_as_given(error: ValidationError, values: Mapping[str, Any]) -> ValidationError:
    """Return the error with the engine's settings under the names that the user gave them."""
    made_up = values.get("synthetic")
    lines = []
    for item in error.errors(include_url=False):
        location = item["loc"]
        if location[:1] == ("engine",) and len(location) > 1:
            if location[1] in values:
                location = location[1:]
            elif isinstance(made_up, Mapping) and location[1] in made_up:
                location = ("synthetic", *location[1:])
        lines.append(InitErrorDetails(type=item["type"], loc=location, input=item["input"], ctx=item.get("ctx", {})))
    return ValidationError.from_exception_data(error.title, lines)
