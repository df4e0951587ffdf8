"""Configuration of one source: a model, the engine that scores with it, and where it runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from services.common.settings import Settings

MAX_TOP_K = 1024
_OF_TRANSFORMERS = ("device", "torch_threads")
_OF_A_DEPLOYMENT = (
    *("dtype", "device", "max_top_k", "bos_token", "max_tokens", "max_text_bytes", "max_tokens_in_flight"),
    *("engine_args", "env", "torch_threads", "num_replicas", "num_cpus", "num_gpus", "max_ongoing_requests"),
)


class SourceConfig(Settings):
    """A source model. With an `address` it is used where it runs; without one it is deployed."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="Name of the Serve application.")
    model: str = Field(min_length=1, description="Name of a fetched model, or a local folder.")
    engine: Literal["vllm", "transformers"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", description="For engine transformers: auto, cpu, cuda, cuda:1 ...")
    top_k: int = Field(64, ge=1, le=MAX_TOP_K, description="Candidates per token asked for by the fusion service.")
    max_top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="Largest top_k that is served; default top_k.")
    bos_token: str | None = Field(
        None, description="Token put in front of every text; default the tokenizer's BOS, else its EOS."
    )
    eos_token: str | None = Field(
        None, description="Token that ended documents in pretraining, for the end row; default the tokenizer's EOS."
    )
    max_tokens: int = Field(
        2047, ge=1, description="Longest text in tokens, left context and EOS included; one more is kept for BOS."
    )
    max_text_bytes: int = Field(32_768, ge=1, description="Longest text in bytes, left context included.")
    max_tokens_in_flight: int = Field(
        4096, ge=1, description="Tokens handed to the engine at once: it builds float32 rows of the whole vocabulary."
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed on to vllm.AsyncEngineArgs.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")
    torch_threads: int | None = Field(None, ge=1, description="For engine transformers on CPU.")

    address: str | None = Field(None, pattern=r"^[^\s/]+:\d+$", description="host:port of a source that runs already.")
    application: str | None = Field(None, description="Serve application at that address; default the name.")

    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if self.max_top_k is not None and self.max_top_k < self.top_k:
            raise ValueError(f"max_top_k ({self.max_top_k}) must be at least top_k ({self.top_k})")
        if self.application is not None and self.address is None:
            raise ValueError("application goes with address; a source that is deployed is named by `name`")
        self._refuse_idle(
            _OF_A_DEPLOYMENT, self.address is not None, "leave it out with address: the source runs already"
        )
        self._refuse_idle(_OF_TRANSFORMERS, self.engine == "vllm", "only engine transformers takes it")
        self._refuse_idle(("engine_args",), self.engine == "transformers", "only engine vllm takes it")
        if self.max_tokens_in_flight <= self.max_tokens:
            raise ValueError("max_tokens_in_flight must be above max_tokens, or the longest text could never run")
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
