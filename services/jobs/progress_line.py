"""One line of progress that people can read and `submit` can parse: it crosses Ray's job log as plain text."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0

_LINE = re.compile(
    r"\[distill (?P<run>\S+)\] step (?P<step>\d+)/(?P<total>\d+)  epoch (?P<epoch>\d+)  loss (?P<loss>\S+)  "
    r"(?P<rate>\d+) tokens/s  waiting (?P<wait>\d+) %  ETA (?P<eta>\d+) s"
)


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run after a step."""

    run_name: str
    step: int
    total_steps: int
    epoch: int
    loss: float
    tokens_per_second: float
    wait_share: float
    eta_seconds: float

    def line(self) -> str:
        return (
            f"[distill {self.run_name}] step {self.step}/{self.total_steps}  epoch {self.epoch}  loss {self.loss:.4f}"
            f"  {self.tokens_per_second:.0f} tokens/s  waiting {100 * self.wait_share:.0f} %"
            f"  ETA {self.eta_seconds:.0f} s"
        )


def parse_progress(line: str) -> Progress | None:
    """The progress in a line of a job's log, which may carry a prefix of Ray's; None for any other line."""
    found = _LINE.search(line)
    if found is None:
        return None
    return Progress(
        run_name=found["run"],
        step=int(found["step"]),
        total_steps=int(found["total"]),
        epoch=int(found["epoch"]),
        loss=float(found["loss"]),
        tokens_per_second=float(found["rate"]),
        wait_share=int(found["wait"]) / 100,
        eta_seconds=float(found["eta"]),
    )


class ProgressPrinter:
    """A line every few seconds, and at the end."""

    def __init__(self, run_name: str, total_steps: int, *, done_steps: int, done_tokens: int, enabled: bool) -> None:
        self._run_name, self._total_steps, self._enabled = run_name, total_steps, enabled
        self._started = self._shown = time.monotonic()
        self._done_steps, self._done_tokens = done_steps, done_tokens
        self._waited = 0.0

    def show(self, row: dict[str, Any]) -> None:
        """Takes the metrics of a step."""
        now, step = time.monotonic(), row["step"]
        self._waited += row["data_wait_seconds"]
        if not self._enabled or (now - self._shown < _INTERVAL_SECONDS and step != self._total_steps):
            return
        self._shown = now
        seconds = max(1e-6, now - self._started)
        progress = Progress(
            run_name=self._run_name,
            step=step,
            total_steps=self._total_steps,
            epoch=row["epoch"],
            loss=row["loss"],
            tokens_per_second=(row["total_tokens"] - self._done_tokens) / seconds,
            wait_share=min(1.0, self._waited / seconds),
            eta_seconds=seconds / (step - self._done_steps) * (self._total_steps - step),
        )
        logger.info(progress.line())
