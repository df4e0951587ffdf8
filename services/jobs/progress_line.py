"""One line of progress that people can read and `ray_job` can parse: it crosses Ray's job log as plain text."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 5.0

_LINE = re.compile(
    r"\[distill (?P<run>\S+)\] step (?P<step>\d+)/(?P<total>\d+)  epoch (?P<epoch>\d+)  (?:stage (?P<stage>\S+)  )?"
    r"loss (?P<loss>\S+)  (?P<rate>\d+) tokens/s  waiting (?P<wait>\d+) %  ETA (?P<eta>\d+) s"
)


@dataclass(frozen=True, slots=True)
class RunProgress:
    """State of a run after a step."""

    run_name: str
    step: int
    total_steps: int
    epoch: int
    loss: float
    tokens_per_second: float
    wait_share: float
    eta_seconds: float
    stage: str = ""

    def line(self) -> str:
        """Return the state as the line that `parse_progress` reads."""
        stage = f"stage {self.stage}  " if self.stage else ""
        return (
            f"[distill {self.run_name}] step {self.step}/{self.total_steps}  epoch {self.epoch}  {stage}"
            f"loss {self.loss:.4f}  {self.tokens_per_second:.0f} tokens/s  waiting {100 * self.wait_share:.0f} %"
            f"  ETA {self.eta_seconds:.0f} s"
        )


def parse_progress(line: str) -> RunProgress | None:
    """Return the progress in a line of a job's log, which may carry a prefix of Ray's; None for any other line."""
    found = _LINE.search(line)
    if found is None:
        return None
    return RunProgress(
        run_name=found["run"],
        step=int(found["step"]),
        total_steps=int(found["total"]),
        epoch=int(found["epoch"]),
        loss=float(found["loss"]),
        tokens_per_second=float(found["rate"]),
        wait_share=int(found["wait"]) / 100,
        eta_seconds=float(found["eta"]),
        stage=found["stage"] or "",
    )


@dataclass(slots=True)
class _Pace:
    """Steps of one kind, the time that they took, and the part of it that they waited for data."""

    steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class ProgressPrinter:
    """A printer of a line every few seconds, and at the end.

    Sources score the windows of the first epoch; later epochs find them in the store. The remaining time counts the two
    apart: until a later epoch has begun, its steps are taken to last as long as the first one's without their waiting.
    """

    def __init__(
        self,
        run_name: str,
        total_steps: int,
        *,
        steps_per_epoch: int,
        done_tokens: int,
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_name, self._total_steps, self._enabled = run_name, total_steps, enabled
        self._steps_per_epoch, self._done_tokens, self._clock = steps_per_epoch, done_tokens, clock
        self._started = self._shown = self._last = clock()
        self._scored, self._kept = _Pace(), _Pace()

    def show(self, row: dict[str, Any]) -> None:
        """Take the metrics of a step, and print them when it is time."""
        now, step = self._clock(), row["step"]
        pace = self._scored if step <= self._steps_per_epoch else self._kept
        pace.steps += 1
        pace.seconds += now - self._last
        pace.waited_seconds += row["data_wait_seconds"]
        self._last = now
        if not self._enabled or (now - self._shown < _INTERVAL_SECONDS and step != self._total_steps):
            return
        self._shown = now
        seconds = max(1e-6, now - self._started)
        progress = RunProgress(
            run_name=self._run_name,
            step=step,
            total_steps=self._total_steps,
            epoch=row["epoch"],
            loss=row["loss"],
            tokens_per_second=(row["total_tokens"] - self._done_tokens) / seconds,
            wait_share=min(1.0, (self._scored.waited_seconds + self._kept.waited_seconds) / seconds),
            eta_seconds=self._seconds_left(step),
            stage=row.get("stage", ""),
        )
        logger.info(progress.line())

    def _seconds_left(self, step: int) -> float:
        to_score = max(0, self._steps_per_epoch - step)
        to_repeat = self._total_steps - step - to_score
        scored, kept = self._scored, self._kept
        if kept.steps == 0:
            kept = _Pace(scored.steps, max(0.0, scored.seconds - scored.waited_seconds))
        return to_score * scored.seconds / max(1, scored.steps) + to_repeat * kept.seconds / max(1, kept.steps)
