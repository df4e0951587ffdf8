"""The training runs below a folder, with their progress."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from services.jobs.run_folder import RunFolder
from services.jobs.step_log import last_row


@dataclass(frozen=True, slots=True)
class RunState:
    """A training run, as far as its folder shows it.

    Attributes:
        folder: of the run.
        step, total_steps: steps taken, and in all; the total is 0 where the record does not say.
        loss: of the last step, None before the first.
        done: whether the trained model is there.
        changed: time of the last step, or of the start where there is none.
        git_revision: of the code that started it.
    """

    folder: Path
    step: int
    total_steps: int
    loss: float | None
    done: bool
    changed: datetime
    git_revision: str


def find_runs(folder: Path) -> Iterator[RunState]:
    """Yield runs in `folder` or up to two levels below it, in the order of their names; skip damaged records."""
    for pattern in ("run.json", "*/run.json", "*/*/run.json"):
        for record in sorted(folder.glob(pattern)):
            files = RunFolder(record.parent)
            try:
                facts = json.loads(record.read_text(encoding="utf-8"))
                total, revision = int(facts.get("total_steps", 0)), str(facts["git_revision"])
            except (OSError, ValueError, KeyError):
                continue
            last = last_row(files.metrics)
            latest = files.metrics if last else record
            yield RunState(
                folder=files.path,
                step=last["step"] if last else 0,
                total_steps=total,
                loss=last["loss"] if last else None,
                done=(files.model / "config.json").is_file(),
                changed=datetime.fromtimestamp(latest.stat().st_mtime),
                git_revision=revision,
            )
