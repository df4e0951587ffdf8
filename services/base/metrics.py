"""Prometheus metrics through Ray, which exports them on the metrics port of every Ray node.

A component makes one `Meter` and defines its metrics from it, each with a sentence that says what it counts:

    meter = Meter("source", source=config.name)
    tokens = meter.counter("tokens_scored_total", "Rows sent out, a row per token of text.")
    tokens.inc(256)

That is `ray_llm_fusion_source_tokens_scored_total{source="..."}` to Prometheus (Ray puts `ray_` in front). Names follow
Prometheus' conventions: units as suffix (`_seconds`, `_bytes`), counters end in `_total`. Recording costs about a
microsecond: once per window is fine, once per token is not. Ray keeps the sum of a histogram only as precisely as its
buckets, so times that are to be averaged are counters of seconds.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

_PREFIX = "llm_fusion"


class Meter:
    """A maker of metrics named llm_fusion_COMPONENT_NAME that all carry the same tags."""

    def __init__(self, component: str, **tags: str) -> None:
        self._component = component
        self._tags = tags

    def counter(self, name: str, description: str, *, labels: tuple[str, ...] = ()) -> Counter:
        """Return a sum that only grows; `labels` are given with each `inc(value, {label: ...})`."""
        metric = Counter(self._full(name), description, (*self._tags, *labels))
        metric.set_default_tags(self._tags)
        return metric

    def gauge(self, name: str, description: str, *, labels: tuple[str, ...] = ()) -> Gauge:
        """Return a value that rises and falls."""
        metric = Gauge(self._full(name), description, (*self._tags, *labels))
        metric.set_default_tags(self._tags)
        return metric

    def _full(self, name: str) -> str:
        return f"{_PREFIX}_{self._component}_{name}"
