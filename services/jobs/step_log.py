"""What a run leaves behind line by line: metrics and the ledger of consumed windows. Written by rank 0.

`metrics.jsonl`, a line per step:
    step, epoch                    counted from 1 and from 0
    loss, clm, fusion              nats per token over the global batch; fusion null without fused rows
    lambda, learning_rate, gradient_norm
    tokens, windows                of this step, all workers together
    skipped                        windows of this step that came without distributions, for want of sources
    total_tokens, total_windows    since the start of the run, skipped windows included
    tokens_per_second, step_seconds
    data_wait_seconds              of this step, the worker that waited longest
    masked_share                   share of this step's tokens that the fusion loss left out
    covered_mass                   mean mass that reached the candidates before the cut to K, weighted by tokens
    source_weights                 per source, mean share of the mixture, weighted by tokens
`ledger.jsonl`, a line per step: epoch, step, and the place of every consumed window in the split's ledger, and of every
skipped one.
`evaluations.jsonl`, a line per evaluation: step, epoch, nats_per_byte of the held-out split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.jobs.run_folder import RunFolder


class RunLogs:
    """The logs of a run; does nothing on workers where it is not enabled."""

    def __init__(self, files: RunFolder, *, after_step: int, enabled: bool) -> None:
        """Drops what earlier attempts wrote behind `after_step`."""
        self._logs: dict[str, StepLog] = {}
        if enabled:
            paths = {"metrics": files.metrics, "ledger": files.ledger, "evaluations": files.evaluations}
            self._logs = {name: StepLog(path, after_step=after_step) for name, path in paths.items()}

    def step(self, metrics: dict[str, Any], windows: Sequence[int], skipped: Sequence[int]) -> None:
        """A step's metrics, the windows that it consumed, and those that the stream left out."""
        if self._logs:
            where = {"epoch": metrics["epoch"], "step": metrics["step"]}
            self._logs["metrics"].write(metrics)
            self._logs["ledger"].write({**where, "windows": list(windows), "skipped": list(skipped)})

    def evaluation(self, step: int, epoch: int, nats_per_byte: float) -> None:
        """A score on the held-out split."""
        if self._logs:
            self._logs["evaluations"].write({"step": step, "epoch": epoch, "nats_per_byte": nats_per_byte})

    def sync(self) -> None:
        """Brings all rows to disk; called before a checkpoint that builds on them becomes visible."""
        for log in self._logs.values():
            log.sync()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()


class StepLog:
    """A file of JSON lines with a `step` each, in which a resumed run goes on exactly behind its checkpoint."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Opens for appending, and drops what lies behind `after_step`: those steps will be taken again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        _truncate(path, after_step)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a log; a killed writer may leave half a line at the end, which is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _truncate(path: Path, after_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= after_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)
