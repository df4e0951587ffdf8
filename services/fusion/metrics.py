"""The metrics that the fusion service reports to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from fusion.v1 import fusion_pb2
from fusion_core.blocks import Block
from services.base.metrics import Meter


class FusionMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        meter = Meter("fusion")
        self._texts = meter.counter("texts_total", "Texts that were fused.")
        self._tokens = meter.counter("tokens_total", "Rows of fused texts, one per target token.")
        self._masked = meter.counter("masked_tokens_total", "Rows that could not be aligned.")
        self._missing = meter.counter(
            "source_missing_total", "Fused texts that a source took no part in.", labels=("source",)
        )
        self._weight = meter.counter(
            "source_weight_total", "Sum of a source's weights over fused texts.", labels=("source",)
        )
        self._quorum_lost = meter.counter("quorum_lost_total", "Texts refused because too few sources answered.")
        self._serving = meter.gauge(
            "source_serving", "1 while a source answers the service, 0 when not.", labels=("source",)
        )
        self._breaker_open = meter.gauge(
            "source_breaker_open", "1 while a source is left out until a trial succeeds, else 0.", labels=("source",)
        )
        self._degraded = meter.counter("degraded_total", "Texts that were fused without one source or more.")
        self._skipped = meter.counter("skipped_total", "Windows left out because too few sources answered.")
        self._streams = meter.gauge("streams", "Fused streams that are open.")
        self._in_flight = meter.gauge("windows_in_flight", "Windows begun on fused streams, and not sent yet.")
        self.counts = fusion_pb2.ReplicaCounts()

    def fused(self, block: Block) -> None:
        """Count a text that was fused."""
        self._texts.inc(1)
        self.counts.windows += 1
        self.counts.tokens += block.num_tokens
        if is_degraded(block):
            self.counts.degraded += 1
            self._degraded.inc(1)
        if block.num_tokens:
            self._tokens.inc(block.num_tokens)
        if masked := block.num_tokens - int(block.mask_T.sum()):
            self._masked.inc(masked)
        for share in block.shares:
            tags = {"source": share.name}
            if share.present:
                if share.weight > 0:
                    self._weight.inc(share.weight, tags)
            else:
                self._missing.inc(1, tags)

    def quorum_lost(self) -> None:
        """Count a text that too few sources answered for."""
        self._quorum_lost.inc(1)

    def serving(self, statuses: Iterable[fusion_pb2.SourceStatus]) -> None:
        """Set whether each source answered just now."""
        for status in statuses:
            self._serving.set(float(status.serving), {"source": status.name})
            is_open = status.breaker != fusion_pb2.BREAKER_STATE_CLOSED
            self._breaker_open.set(float(is_open), {"source": status.name})

    def skipped(self) -> None:
        """Count a window that was left out of its stream."""
        self.counts.skipped += 1
        self._skipped.inc(1)

    def under_way(self, streams: int, windows_in_flight: int) -> None:
        """Set how many streams are open, and how many of their windows are begun and not sent yet."""
        self.counts.streams, self.counts.windows_in_flight = streams, windows_in_flight
        self._streams.set(streams)
        self._in_flight.set(windows_in_flight)


def is_degraded(block: Block) -> bool:
    """Return whether a source took no part in a fused block."""
    return any(not share.present for share in block.shares)
