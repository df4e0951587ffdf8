"""The metrics that the recall service reports to Prometheus."""

from __future__ import annotations

from services.base.metrics import Meter


class RecallMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        meter = Meter("recall")
        self.documents = meter.counter("documents_total", "Texts whose key blocks were selected.")
        self.text_bytes = meter.counter("text_bytes_total", "Bytes of these texts.")
        self.seconds = meter.counter("seconds_total", "Time that they took, that in the queue for the judge included.")
        self.errors = meter.counter("errors_total", "Calls that failed, by status code.", labels=("code",))
