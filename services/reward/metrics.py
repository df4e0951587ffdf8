"""The metrics that the reward service reports to Prometheus."""

from __future__ import annotations

from services.base.metrics import Meter


class RewardMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        meter = Meter("reward")
        self.answers = meter.counter("answers_total", "Answers that were scored, by domain.", labels=("domain",))
        self.tokens = meter.counter("tokens_total", "Tokens that the model read, padding not counted.")
        self.scores = meter.counter(
            "positive_scores_total", "Answers with a score above 0, by domain.", labels=("domain",)
        )
        self.seconds = meter.counter("seconds_total", "Time that scores took, that in the queue included.")
        self.errors = meter.counter("errors_total", "Calls that failed, by status code.", labels=("code",))
