"""TensorBoard as a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.jobs.run_folder import RunFolder
from services.jobs.tracking.config import Tracking


class TensorBoard:
    """Event files in the run's folder; steps that are taken again are purged by whoever reads them.

    The files are written behind the caller's back, so that a kill takes some of the last steps.
    """

    def __init__(self, tracking: Tracking, run_name: str, files: RunFolder, after_step: int) -> None:
        from tensorboardX import SummaryWriter

        newest = _newest_event_step(files.events) - 1  # the last step may lack some of its figures
        self.last_step = min(after_step, max(0, newest))
        self._events: Any = SummaryWriter(
            str(files.events), purge_step=self.last_step + 1, filename_suffix=f".{after_step:09d}"
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self, *, failed: bool) -> None:
        self._events.close()


def _newest_event_step(events: Path) -> int:
    """Return the largest step in the newest file of events; 0 where there is none."""
    from tensorboardX.proto.event_pb2 import Event

    newest, start = 0, 0
    data = max(events.glob("events.*")).read_bytes() if any(events.glob("events.*")) else b""
    while start + 12 <= len(data):  # records of length, its checksum, an event, its checksum
        end = start + 12 + int.from_bytes(data[start : start + 8], "little")
        if end <= len(data):
            newest = max(newest, Event.FromString(data[start + 12 : end]).step)
        start = end + 4
    return newest
