"""Configuration of one source: a model, the engine that scores with it, and where it runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from services.base.settings import MEMORY_PATTERN, Settings
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN

MAX_TOP_K = 1024
_OF_TRANSFORMERS = ("device", "torch_threads")
_OF_VLLM = ("engine_args", "placement_strategy")
_OF_MODELS = ("dtype", "logits_memory_bytes", "trust_remote_code")
OF_A_DEPLOYMENT = (
    *("dtype", "device", "max_top_k", "bos_token", "max_text_bytes", "per_client"),
    *("max_tokens_in_flight", "logits_memory_bytes", "engine_args", "synthetic", "env", "torch_threads", "canary"),
    *("trust_remote_code", "num_replicas"),
    *(
        "autoscaling",
        "num_cpus",
        "num_gpus",
        "memory",
        "placement_strategy",
        "max_ongoing_requests",
        "max_queued_requests",
    ),
)
"""What a source says only where it is deployed, not where it is used by its address."""


class SyntheticConfig(Settings):
    """Engine `synthetic`: made-up distributions at a set pace, from the model folder's tokenizer alone."""

    tokens_per_second: float | None = Field(None, gt=0, description="Pace of the engine; null is as fast as it can.")
    delay_seconds: float = Field(0, ge=0, description="Added to every text's answer; other texts do not wait for it.")
    seed: int = Field(0, ge=0, description="Sources with different seeds predict differently.")


class CanaryConfig(Settings):
    """Built-in texts scored again and again: a model that broke under way is noticed, and serves nothing more."""

    interval_seconds: float | None = Field(300, gt=0, description="Time between two checks; null checks at start only.")
    tolerance_nats: float = Field(
        0.05, gt=0, description="Largest mean drift of a token's log-probability from the first run's."
    )


class AutoscalingConfig(Settings):
    """Replicas by load: Serve adds and removes them so that each holds about `target_ongoing_requests`."""

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


class SourceConfig(Settings):
    """A source model. With an `address` it is used where it runs; without one it is deployed."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="Name of the Serve application.")
    model: str = Field(min_length=1, description="Name of a fetched model, or a local folder.")
    engine: Literal["vllm", "transformers", "synthetic"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="For engine transformers: auto, cpu, cuda, cuda:1 ...")
    top_k: int = Field(64, ge=1, le=MAX_TOP_K, description="Candidates per token asked for by the fusion service.")
    max_top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="Largest top_k that is served; default top_k.")
    bos_token: str | None = Field(
        None, description="Token put in front of every text; default the tokenizer's BOS, else its EOS."
    )
    eos_token: str | None = Field(
        None, description="Token that ends a document, for the end row; default the tokenizer's EOS."
    )
    max_tokens: int = Field(
        2047,
        ge=1,
        description="Longest text in tokens, left context and EOS included; one more is kept for BOS. Windows are "
        "planned for it; with an address it says what the source there takes.",
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
    logits_memory_bytes: int = Field(
        2 * 1024**3,
        ge=1,
        description="Memory of a replica for float32 rows over the whole vocabulary; it bounds the engine's batch.",
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed on to vllm.AsyncEngineArgs.")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="For engine synthetic.")
    canary: CanaryConfig = Field(CanaryConfig(), description="Checks on the model while it serves.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")
    trust_remote_code: bool = Field(
        False, description="Run Python files that the model's folder brings. Tokenizers run none in any case."
    )
    torch_threads: int | None = Field(None, ge=1, description="For engine transformers on CPU.")

    address: str | None = Field(
        None,
        pattern=ADDRESS_PATTERN,
        description="host:port of a source that runs already; grpcs://host:port with TLS.",
    )
    application: str | None = Field(None, description="Serve application at that address; default the name.")

    num_replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingConfig | None = Field(None, description="Instead of a fixed num_replicas.")
    num_cpus: float = Field(1, ge=0, description="Logical CPUs of a replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica, all its tensor parallel workers together.")
    memory: str | None = Field(
        None, pattern=MEMORY_PATTERN, description="Memory of a pod on Kubernetes, such as 48Gi; default the manifests'."
    )
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray places the workers of a replica that takes several GPUs."
    )
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if self.max_top_k is not None and self.max_top_k < self.top_k:
            raise ValueError(f"max_top_k ({self.max_top_k}) must be at least top_k ({self.top_k})")
        if self.application is not None and self.address is None:
            raise ValueError("application goes with address; a source that is deployed is named by `name`")
        self._refuse_idle(
            OF_A_DEPLOYMENT, self.address is not None, "leave it out with address: the source runs already"
        )
        self._refuse_idle(_OF_TRANSFORMERS, self.engine != "transformers", "only engine transformers takes it")
        self._refuse_idle(_OF_VLLM, self.engine != "vllm", "only engine vllm takes it")
        self._refuse_idle(_OF_MODELS, self.engine == "synthetic", "engine synthetic loads no model")
        if "trust_remote_code" in self.engine_args:
            raise ValueError("engine_args.trust_remote_code: is the source's own key trust_remote_code")
        self._refuse_idle(("synthetic",), self.engine != "synthetic", "only engine synthetic takes it")
        self._refuse_idle(("num_replicas",), self.autoscaling is not None, "autoscaling decides it")
        if self.max_tokens_in_flight is not None:
            self._refuse_idle(
                ("logits_memory_bytes",), self.engine != "vllm", "max_tokens_in_flight is set and takes its place"
            )
            if self.max_tokens_in_flight <= self.max_tokens:
                raise ValueError("max_tokens_in_flight must be above max_tokens, or the longest text could never run")
        if self.num_workers > 1 and self.num_gpus not in {0, self.num_workers}:
            raise ValueError(
                f"num_gpus: engine_args ask for {self.num_workers} workers (tensor_parallel_size times "
                f"pipeline_parallel_size), a GPU each; got {self.num_gpus:g}"
            )
        self._refuse_idle(
            ("placement_strategy",), not self.places_workers, "only a replica that takes several GPUs is placed"
        )
        return self

    def _refuse_idle(self, keys: tuple[str, ...], refused: bool, why: str) -> None:
        """What would be read and then ignored is an error, unless it says no more than the default."""
        for key in keys if refused else ():
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: {why}")

    @property
    def largest_top_k(self) -> int:
        return self.max_top_k or self.top_k

    @property
    def application_name(self) -> str:
        return self.application or self.name

    @property
    def num_workers(self) -> int:
        """Processes of a replica that hold a part of the model each."""
        parallel = (self.engine_args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        sizes = [int(size) for size in parallel]
        return sizes[0] * sizes[1]

    @property
    def places_workers(self) -> bool:
        """Whether Ray places the workers one by one; with executor mp they all live where the replica does."""
        backend = self.engine_args.get("distributed_executor_backend", "ray")
        return self.num_workers > 1 and self.num_gpus > 0 and backend == "ray"

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas
