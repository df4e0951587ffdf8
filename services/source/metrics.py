"""Metrics of a source for Prometheus; each carries the tag `source`."""

from __future__ import annotations

from services.base.metrics import Meter


class SourceMetrics:
    """The metrics of one replica."""

    def __init__(self, source: str) -> None:
        meter = Meter("source", source=source)
        self.tokens_scored = meter.counter("tokens_scored_total", "Rows that went out, one per token of text.")
        self.engine_seconds = meter.counter(
            "engine_seconds_total", "Time that texts spent in the engine; texts that share a batch count each."
        )
        self.queue_seconds = meter.counter("queue_seconds_total", "Time that texts waited for their turn.")
        self.texts_scored = meter.counter("texts_scored_total", "Texts that went through the engine.")
        self.answers_generated = meter.counter("answers_generated_total", "Answers that the engine sampled.")
        self.tokens_generated = meter.counter("tokens_generated_total", "Tokens of these answers.")
        self.texts_refused = meter.counter("texts_refused_total", "Texts to which the model had no plausible answer.")
        self.wire_bytes = meter.counter("wire_bytes_total", "Bytes of encoded blocks.")
        self.errors = meter.counter("errors_total", "Calls that failed, by status code.", labels=("code",))
        self.tokens_in_flight = meter.gauge("tokens_in_flight", "Tokens that the engine holds now.")
        self.canary_ok = meter.gauge("canary_ok", "1 while the canary texts score as recorded, 0 when not.")
