"""Configuration of the alignment-fusion service."""

from __future__ import annotations

from pydantic import Field

from fusion_core.fusion import FusionConfig
from services.common.limits import PerClient
from services.common.settings import Settings
from services.common.tls import ADDRESS_PATTERN


class ServiceConfig(Settings):
    """Section `service` of a recipe: where the services listen and how large requests may be."""

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
    max_ongoing_requests: int = Field(64, ge=1, description="Calls and streams that a replica holds at once.")
    max_queued_requests: int = Field(256, ge=1, description="Calls that wait for a replica; more are refused.")
    max_texts: int = Field(32, ge=1, le=256, description="Texts in one Fuse request.")
    max_text_bytes: int = Field(32_768, ge=1, description="Longest text in bytes, left context included.")
    per_client: PerClient = Field(PerClient(), description="What one client may hold of a replica.")
    source_timeout_seconds: float = Field(600, gt=0, description="Longest wait for one source's answer to one text.")
    source_attempts: int = Field(3, ge=1, description="Attempts per source and text before it counts as missing.")
    store: str | None = Field(
        "store",
        min_length=1,
        description="Folder (relative to the run's) or URL, such as s3://bucket/folder, that keeps scored windows, so "
        "that a pass is paid for once. null keeps nothing.",
    )


class SourceEndpoint(Settings):
    """A source as the fusion service reaches it."""

    name: str
    model: str = Field(description="Where the tokenizer comes from: a fetched model or a folder.")
    address: str
    application: str
    top_k: int
    eos_token: str | None = Field(None, description="Token that ends documents; default the tokenizer's EOS.")
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
