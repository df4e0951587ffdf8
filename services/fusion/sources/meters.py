"""Counters of one source behind the fusion service, and of its windows in the store."""

from __future__ import annotations

from services.base.metrics import Meter


class SourceMeter:
    """Counts of the misses, retries and timeouts of one source, for Prometheus and for `GetFusionInfo`."""

    def __init__(self, source: str) -> None:
        meter = Meter("fusion", source=source)
        self._retries = meter.counter("source_retries_total", "Attempts after the first for a text.")
        self._timeouts = meter.counter("source_timeouts_total", "Deadlines that the source missed.")
        self.missing = self.retries = self.timeouts = 0

    def miss(self) -> None:
        """Count a text that is fused without the source; Prometheus counts it with the fused blocks."""
        self.missing += 1

    def retry(self) -> None:
        self.retries += 1
        self._retries.inc()

    def timeout(self) -> None:
        self.timeouts += 1
        self._timeouts.inc()


class StoreMetrics:
    """Counts of the hits and misses of the store for the windows of one source."""

    def __init__(self, source: str) -> None:
        meter = Meter("store", source=source)
        self.hits = meter.counter("hits_total", "Windows that were read from the store.")
        self.misses = meter.counter("misses_total", "Windows that the source had to be asked for.")
