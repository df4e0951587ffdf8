"""One selection from a text, measured in a process that does nothing else."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, process_time

import torch

from fusion_core.recall.memory import MemoryConfig
from services.recall.judge import Judge

_WARM_UP = "A first sentence that is read before anything is measured."


def selection(folder: str, question: str, text: str) -> tuple[int, float, float, float, float]:
    """Return a text's tokens, CPU and wall seconds of one selection from it, and the MiB before it and at its peak."""
    torch.set_num_threads(1)
    judge = Judge.load(folder, precision="auto")
    judge.recall(question, judge.read(_WARM_UP), MemoryConfig())
    _reset_peak()
    before = _status("VmRSS")
    cpu, wall = process_time(), perf_counter()
    document = judge.read(text)
    judge.recall(question, document, MemoryConfig())
    cpu, wall = process_time() - cpu, perf_counter() - wall
    return sum(document.tokens_in_window), cpu, wall, before, _status("VmHWM")


def _reset_peak() -> None:
    """Have Linux forget the peak so far: loading takes more than a selection, which would then show in no figure."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    """Return a figure of this process's memory in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024
