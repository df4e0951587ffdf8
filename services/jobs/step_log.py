"""The logs of a run, a line per step: metrics and the ledger of consumed windows. Written by rank 0.

`metrics.jsonl`, a line per step:
    step, epoch                    counted from 1 and from 0; of a curriculum, epoch is the number of the stage
    stage                          name of the stage, where the run has a curriculum
    loss, clm, fusion              nats per token over the global batch; fusion null without fused rows
    lambda, learning_rate, gradient_norm
    tokens, windows                of this step, all workers together; tokens are those with a loss
    input_tokens                   tokens that the target read in this step: BOS, contexts and tokens
    skipped                        windows of this step that came without distributions, for want of sources
    total_tokens, total_windows    since the start of the run, skipped windows included
    tokens_per_second, step_seconds
    data_wait_seconds              of this step, the worker that waited longest
    masked_share                   share of this step's tokens that the fusion loss left out
    covered_mass                   mean mass that reached the candidates before the cut to K, weighted by tokens
    source_weights                 per source, mean share of the mixture, weighted by tokens
    scored_by                      the same for windows that the same sources scored, a group each: sources (their
                                   weights), windows, tokens
    routing                        of a target with experts only; lists with a value for each of its `layers`:
                                   load_cv (standard deviation of the experts' loads over their mean), dead_experts
                                   (without a token), router_entropy (nats), balance (DeepSeekMoE's loss, 1 when even)
    on_policy                      of a run that learns from the target's own answers; clm leaves their tokens out:
                                   round, staleness (steps since the answers were written), windows (answers of this
                                   step), skipped (those that could not be fused), share (of this step's tokens),
                                   mean_length (tokens of an answer), ended_share (of the answers), reverse_kl (nats per
                                   token: mean over the answers' tokens of the target's log-probability minus the fused)
`ledger.jsonl`, a line per step: epoch, step, and the place in the split's ledger of every consumed window and of every
skipped one: a list of numbers, and with a curriculum a list for every split. With own answers also `round`, the folder
of their ledger below `rounds/`, and the places in it of the `answers` of the step and of `answers_skipped`.
`evaluations.jsonl`, a line per evaluation: step, epoch, nats_per_byte of the held-out split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from services.jobs.run_folder import RunFolder

LedgerPlaces = list[int] | dict[str, list[int]]
"""Indices of windows in the ledger of their split; by split, where a run draws from several."""
_BLOCK_BYTES = 1 << 16
"""Bytes of a log that are read at a time from its end."""


class RunLogs:
    """The logs of a run; workers where they are not enabled write none."""

    def __init__(self, files: RunFolder, *, after_step: int, enabled: bool) -> None:
        """Drop the lines that earlier attempts wrote behind `after_step`."""
        self._logs: dict[str, StepLog] = {}
        if enabled:
            paths = {"metrics": files.metrics, "ledger": files.ledger, "evaluations": files.evaluations}
            self._logs = {name: StepLog(path, after_step=after_step) for name, path in paths.items()}

    def step(
        self, metrics: dict[str, Any], windows: LedgerPlaces, skipped: LedgerPlaces, answers: Mapping[str, Any]
    ) -> None:
        """Write a step's metrics, the windows that it consumed, those that the stream left out, and own answers."""
        if self._logs:
            where = {"epoch": metrics["epoch"], "step": metrics["step"]}
            self._logs["metrics"].write(metrics)
            self._logs["ledger"].write({**where, "windows": windows, "skipped": skipped, **answers})

    def evaluation(self, step: int, epoch: int, nats_per_byte: float) -> None:
        """Write a score on the held-out split."""
        if self._logs:
            self._logs["evaluations"].write({"step": step, "epoch": epoch, "nats_per_byte": nats_per_byte})

    def sync(self) -> None:
        """Bring all rows to disk; called before a checkpoint that builds on them becomes visible."""
        for log in self._logs.values():
            log.sync()

    def close(self) -> None:
        """Close all files."""
        for log in self._logs.values():
            log.close()


class StepLog:
    """A file of JSON lines with a `step` each, which a resumed run continues exactly after its checkpoint."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Open for appending, and drop the lines behind `after_step`: those steps will be taken again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, after_step)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Bring the lines to disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all complete rows of a log, without half a line at the end, which a killed writer may leave."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def last_row(path: Path) -> dict[str, Any] | None:
    """Return the last complete row of a log, read from its end; None when there is none."""
    if not path.exists():
        return None
    with path.open("rb") as stream:
        return next((row for _, line in _lines_backwards(stream) if (row := _row(line)) is not None), None)


def _truncate(path: Path, after_step: int) -> None:
    """Cut a log behind its last row of at most `after_step`; only that row and the dropped ones are read."""
    if not path.exists():
        return
    with path.open("r+b") as stream:
        keep = 0
        for start, line in _lines_backwards(stream):
            if (row := _row(line)) is not None and row["step"] <= after_step:
                keep = start + len(line)
                break
        stream.truncate(keep)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line's row; None for half a line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) else None


def _lines_backwards(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from the last one to the first, each with the offset at which it starts."""
    start = stream.seek(0, os.SEEK_END)
    kept = b""  # read already, and not yet known to be whole lines
    while start > 0:
        size = min(_BLOCK_BYTES, start)
        start -= size
        stream.seek(start)
        kept = stream.read(size) + kept
        # The first line read so far may begin before it.
        first_end = kept.find(b"\n") + 1 if start > 0 else 0
        if start > 0 and first_end == 0:
            continue
        at = len(kept)
        while at > first_end:
            begin = max(kept.rfind(b"\n", 0, at - 1) + 1, first_end)
            yield start + begin, kept[begin:at]
            at = begin
        kept = kept[:first_end]
