"""Configuration of the alignment-fusion service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from fusion_core.fusion import FusionConfig
from services.base.settings import MEMORY_PATTERN, Settings
from services.rpc.client_limits import PerClient
from services.rpc.tls import ADDRESS_PATTERN

_PORTS_OF_RAY_WORKERS = range(10_002, 20_000)
"""Ports that Ray gives its processes by default, one to each."""


class ServiceConfig(Settings):
    """Section `service` of a recipe: ports, limits on requests, and the store."""

    address: str | None = Field(
        None,
        pattern=ADDRESS_PATTERN,
        description="host:port of a fusion service that runs already; grpcs://host:port with TLS.",
    )
    application: str = Field("fusion", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    host: str = Field("127.0.0.1", description="Interface of Ray's dashboard and Serve's HTTP proxy.")
    grpc_port: int = Field(9000, ge=1, le=65535, description="Port of Serve's gRPC proxy.")
    http_port: int = Field(8000, ge=1, le=65535, description="Port of Serve's HTTP proxy (readiness only).")
    dashboard_port: int = Field(8265, ge=1, le=65535, description="Port of Ray's dashboard and job API.")
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0)
    memory: str | None = Field(
        None, pattern=MEMORY_PATTERN, description="Memory of a pod on Kubernetes, such as 8Gi; default the manifests'."
    )
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")
    max_texts: int = Field(32, ge=1, le=256, description="Texts in one Fuse request.")
    max_text_bytes: int = Field(32_768, ge=1, description="Longest text in bytes, left context included.")
    per_client: PerClient = Field(PerClient(), description="What one client may hold of a replica.")
    source_timeout_seconds: float = Field(
        60,
        gt=0,
        description="A source that owes answers and sends none for so long counts as missing. Windows under way share "
        "the wait: it bounds the time for one window of a slow model, not that for all of them.",
    )
    source_attempts: int = Field(3, ge=1, description="Attempts per source and text before it counts as missing.")
    retry_budget: float = Field(
        0.2, ge=0, le=1, description="Retries as a share of the texts that a source is asked for, after a first 256."
    )
    breaker_failures: int = Field(
        5,
        ge=1,
        description="A source that fails so often in a row, or misses its deadline once, is not asked any more: it "
        "counts as missing at once, until a trial succeeds.",
    )
    breaker_pause_seconds: float = Field(5, gt=0, description="Time between trials of a source that is not asked.")
    heartbeat_seconds: float = Field(
        5, gt=0, le=10, description="A fused stream that has nothing to send says so often that it lives."
    )
    below_quorum: Literal["wait", "skip"] = Field(
        "wait",
        description="A window of a stream that fewer than fusion.min_sources answer for: wait for it (the stream "
        "breaks and its client retries), or skip it (the client is told, and it goes on the back-fill list).",
    )
    store: str | None = Field(
        "store",
        min_length=1,
        description="Folder (relative to the run's) or URL, such as s3://bucket/folder, that keeps scored windows, so "
        "that a pass is paid for once. null keeps nothing.",
    )

    @field_validator("grpc_port", "http_port", "dashboard_port")
    @classmethod
    def _is_none_of_ray_s(cls, port: int) -> int:
        if port in (taken := _PORTS_OF_RAY_WORKERS):
            raise ValueError(f"{taken.start} to {taken.stop - 1} are the ports of Ray's workers; choose another")
        return port

    @model_validator(mode="after")
    def _skipping_needs_a_store(self) -> ServiceConfig:
        if self.below_quorum == "skip" and self.store is None:
            raise ValueError("below_quorum: skip needs a store, where the back-fill list is kept")
        return self


class SourceEndpoint(Settings):
    """A source as the fusion service reaches it."""

    name: str
    model: str = Field(description="Where the tokenizer comes from: a fetched model or a folder.")
    address: str
    application: str
    top_k: int
    eos_token: str | None = Field(None, description="Token that ends documents; default the tokenizer's EOS.")
    chat_template: str | None = Field(
        None, description="As the source's own key: model, plain or the text of a template; null for documents alone."
    )
    engine: str | None = Field(None, description="As the recipe deploys it: tells stored windows apart.")
    dtype: str | None = Field(None, description="As engine.")
    bos_token: str | None = Field(None, description="As engine.")


class FusionServiceConfig(Settings):
    """Arguments of the fusion application."""

    tokenizer: str = Field(description="Folder of the target's tokenizer.")
    sources: tuple[SourceEndpoint, ...] = Field(min_length=1)
    fusion: FusionConfig
    service: ServiceConfig
    corpora: tuple[str, ...] = Field((), description="Folders of prepared data sets that may be streamed.")
    target_context: bool = Field(
        True,
        description="Whether blocks carry the target's tokens of the left context, see corpus.target_context.",
    )
    target_chat_template: str | None = Field(
        None, description="As a source's chat_template, for the messages before a turn; null where it reads none."
    )
