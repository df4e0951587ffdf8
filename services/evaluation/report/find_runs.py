"""The training runs that lie below a folder, and how far each has come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from services.jobs.run_folder import RunFolder
from services.jobs.step_log import read_rows


@dataclass(frozen=True, slots=True)
class RunState:
    """A training run as its folder shows it.

    Attributes:
        folder: of the run.
        step, total_steps: taken, and in all; total 0 where the record does not say.
        loss: of the last step, None before the first.
        done: whether the trained model is there.
        changed: when the last step was written, or the run claimed.
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
    """Runs in `folder` or up to two levels below it, in the order of their names; damaged records are passed over."""
    for pattern in ("run.json", "*/run.json", "*/*/run.json"):
        for record in sorted(folder.glob(pattern)):
            files = RunFolder(record.parent)
            try:
                facts = json.loads(record.read_text(encoding="utf-8"))
                total, revision = int(facts.get("total_steps", 0)), str(facts["git_revision"])
            except (OSError, ValueError, KeyError):
                continue
            rows = read_rows(files.metrics)
            latest = files.metrics if rows else record
            yield RunState(
                folder=files.path,
                step=rows[-1]["step"] if rows else 0,
                total_steps=total,
                loss=rows[-1]["loss"] if rows else None,
                done=(files.model / "config.json").is_file(),
                changed=datetime.fromtimestamp(latest.stat().st_mtime),
                git_revision=revision,
            )
