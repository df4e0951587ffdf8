"""OpenTelemetry traces: spans where OTEL_EXPORTER_OTLP_ENDPOINT names a collector, W3C trace context in any case.

A request's trace goes from the client's call through the fusion service to each source. The other OTEL_ variables mean
what they always do; without an endpoint, and without a tracer provider of an embedding program, nothing is recorded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_W3C = TraceContextTextMapPropagator()


@functools.cache
def _tracer() -> Tracer:
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return trace.get_tracer("llm-fusion")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "llm-fusion")
    # A provider of our own: the process-wide one may be the engine's.
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("llm-fusion")


@contextmanager
def client_span(method: str) -> Iterator[Span]:
    """Open a span around a call; metadata made inside carry its context."""
    with _spanning(_tracer().start_span(method, kind=SpanKind.CLIENT)) as span:
        yield span


@contextmanager
def server_span(method: str, metadata: Iterable[tuple[str, str]]) -> Iterator[Span]:
    """Open a span around the handling of a call, as a child of the span that the caller's metadata name."""
    parent = _W3C.extract({key: value for key, value in metadata if isinstance(value, str)})
    with _spanning(_tracer().start_span(method, context=parent, kind=SpanKind.SERVER)) as span:
        yield span


@contextmanager
def _spanning(span: Span) -> Iterator[Span]:
    token = otel_context.attach(trace.set_span_in_context(span))
    try:
        yield span
    except Exception as error:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        otel_context.detach(token)
        span.end()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that carry the current span to a service; empty when there is none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return tuple(carrier.items())
