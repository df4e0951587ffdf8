"""Counters of one source behind the fusion service, and of its windows in the store."""

from __future__ import annotations

from services.base.metrics import Meter


class SourceMeter:
    """How often one source did not do its part; kept here as well, for `GetFusionInfo`."""

    def __init__(self, source: str) -> None:
        meter = Meter("fusion", source=source)
        self._retries = meter.counter("source_retries_total", "Attempts after the first for a text.")
        self._timeouts = meter.counter("source_timeouts_total", "Deadlines that the source missed.")
        self.missing = self.retries = self.timeouts = 0

    def miss(self) -> None:
        """A text goes on without the source; its Prometheus counter is with the fused blocks."""
        self.missing += 1

    def retry(self) -> None:
        self.retries += 1
        self._retries.inc()

    def timeout(self) -> None:
        self.timeouts += 1
        self._timeouts.inc()


class StoreMetrics:
    """How much of one source's windows the store spared it."""

    def __init__(self, source: str) -> None:
        meter = Meter("store", source=source)
        self.hits = meter.counter("hits_total", "Windows that were read from the store.")
        self.misses = meter.counter("misses_total", "Windows that the source had to be asked for.")
