"""What the fusion service reports to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from fusion.v1 import fusion_pb2
from fusion_core.blocks import Block
from services.common.metrics import Meter


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

    def fused(self, block: Block) -> None:
        """A text went out."""
        self._texts.inc(1)
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
        """A text was refused."""
        self._quorum_lost.inc(1)

    def serving(self, statuses: Iterable[fusion_pb2.SourceStatus]) -> None:
        """How the sources answered just now."""
        for status in statuses:
            self._serving.set(float(status.serving), {"source": status.name})


class StoreMetrics:
    """How much of one source's windows the store spared it."""

    def __init__(self, source: str) -> None:
        meter = Meter("store", source=source)
        self.hits = meter.counter("hits_total", "Windows that were read from the store.")
        self.misses = meter.counter("misses_total", "Windows that the source had to be asked for.")
