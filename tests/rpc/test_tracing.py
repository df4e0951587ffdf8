"""One trace from a client's call through the fusion service to each source, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fusion.v1 import fusion_pb2_grpc, source_pb2_grpc
from services.fusion.client import FusionClient
from services.fusion.config import FusionServiceConfig
from services.fusion.servicer import FusionServicer
from services.rpc import tracing
from services.source.config import SourceConfig
from services.source.servicer import SourceServicer
from tests.fakes.tiny_model import make_tiny_model


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)
    yield exporter
    provider.shutdown()


async def made(servicer: type, config: Any) -> Any:
    """As Serve makes it: the constructor is awaited."""
    made = servicer.__new__(servicer)
    await made.__init__(config)
    return made


async def serve(servicer: Any, add: Any) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def fuse_once(model: Path, names: list[str]) -> None:
    servers, endpoints = [], []
    try:
        for name in names:
            config = SourceConfig(name=name, model=str(model), engine="synthetic", top_k=4)
            source = await made(SourceServicer, config)
            server, address = await serve(source, source_pb2_grpc.add_SourceServiceServicer_to_server)
            servers.append(server)
            endpoints.append({"name": name, "model": str(model), "address": address, "application": name, "top_k": 4})
        arguments = {"tokenizer": str(model), "sources": endpoints, "fusion": {}, "service": {"store": None}}
        fusion = await made(FusionServicer, FusionServiceConfig.model_validate(arguments))
        server, address = await serve(fusion, fusion_pb2_grpc.add_FusionServiceServicer_to_server)
        servers.append(server)
        [block] = await asyncio.to_thread(FusionClient(address).fuse, [b"some text"])
        assert {share.name for share in block.shares if share.present} == set(names)
    finally:
        for server in servers:
            await server.stop(None)


def test_one_call_is_one_trace_down_to_every_source(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", vocabulary_size=400, seed=3)
    asyncio.run(fuse_once(model, ["one", "two"]))
    by_id: dict[int, ReadableSpan] = {}
    for span in spans.get_finished_spans():
        assert span.context is not None
        by_id[span.context.span_id] = span
    assert len({span.context.trace_id for span in by_id.values() if span.context}) == 1
    [root] = [span for span in by_id.values() if span.parent is None]
    assert root.name == "FusionClient.fuse"
    [handled] = [span for span in by_id.values() if span.name == "FusionServicer.Fuse"]
    assert handled.parent is not None
    assert by_id[handled.parent.span_id] is root
    scored = [span for span in by_id.values() if span.name == "SourceServicer.Score"]
    assert len(scored) == 2
    assert all(span.parent is not None and by_id[span.parent.span_id] is handled for span in scored)


def test_without_an_endpoint_nothing_is_recorded_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracing._tracer.cache_clear()
    with tracing.client_span("nothing") as span:
        assert not span.is_recording()
        assert tracing.trace_metadata() == ()


def test_a_callers_trace_is_handed_on_even_when_this_service_records_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracing._tracer.cache_clear()
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.server_span("method", [("traceparent", caller), ("binary-bin", b"\x00")]):
        assert tracing.trace_metadata() == (("traceparent", caller),)
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_an_endpoint_switches_recording_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing._tracer.cache_clear()
    try:
        assert tracing._tracer().start_span("x").is_recording()
    finally:
        tracing._tracer.cache_clear()


def test_a_failed_call_marks_its_span(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="no"), tracing.server_span("method", ()):
        raise ValueError("no")
    [span] = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
