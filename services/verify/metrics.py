"""The metrics that the verifier reports to Prometheus."""

from __future__ import annotations

from services.base.metrics import Meter


class VerifyMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        meter = Meter("verify")
        self.verdicts = meter.counter(
            "verdicts_total",
            "Answers that were judged, by kind and verdict (right or wrong).",
            labels=("kind", "verdict"),
        )
        self.seconds = meter.counter(
            "seconds_total",
            "Time that verdicts took by kind, and programs run for their output (run), the queue included.",
            labels=("kind",),
        )
        self.errors = meter.counter("errors_total", "Calls that failed, by status code.", labels=("code",))
        self.programs_running = meter.gauge("programs_running", "Programs that run now.")
