"""The processes of one run in sandboxes: started with the limits, killed when time is up, waited for."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from services.base.errors import UnavailableError
from services.verify.sandbox.bubblewrap import interpreter
from services.verify.sandbox.process import SandboxProcess

_PATIENCE_SECONDS = 0.5
"""Time in which a process ends by itself once the result is there; then it is killed."""


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """The most that a program may use; its tests, in a process of their own, may use as much again.

    Attributes:
        seconds: wall time of answer and tests together, and CPU time of each.
        memory_bytes: address space.
        scratch_bytes: files below /tmp.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    scratch_bytes: int = 16 * 2**20


class SandboxRun:
    """One run, of one process or several."""

    def __init__(self, bubblewrap: str, limits: ProgramLimits) -> None:
        self._bubblewrap, self._limits = bubblewrap, limits
        self._processes: list[SandboxProcess] = []
        self._lock = threading.Lock()
        self._ended = self._late = False
        self._timer = threading.Timer(limits.seconds, self._time_out)
        self._timer.daemon = True

    def cancel(self) -> None:
        """Kill all processes, from any thread; nothing is started any more, and the result is there soon."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.kill()

    def _time_out(self) -> None:
        self._late = True
        self.cancel()

    def _spawn(self, side: str, *, pass_fds: tuple[int, ...] = (), **streams: Any) -> SandboxProcess:
        """Start a program of this folder; raises UnavailableError when the run was ended before."""
        limits = self._limits
        numbers = json.dumps([limits.memory_bytes, limits.scratch_bytes, ceil(limits.seconds)])
        words = [*interpreter(), "-c", _source(side), numbers]
        with self._lock:
            if self._ended:
                raise UnavailableError("the run was ended before it began")
            process = SandboxProcess(
                self._bubblewrap, words, scratch_bytes=limits.scratch_bytes, pass_fds=pass_fds, **streams
            )
            self._processes.append(process)
        return process

    def _end(self) -> str:
        """Wait for all processes, which may have to be killed; return what bubblewrap said of errors."""
        self._timer.cancel()
        for process in reversed(self._processes):  # without the tests' side the answer's has nothing to wait for
            process.wait(_PATIENCE_SECONDS)
        with self._lock:
            self._ended = True
            said = [process.close() for process in self._processes]
            self._processes.clear()
        return "; ".join(filter(None, said))


@cache
def _source(side: str) -> str:
    """Return the program of one side: the shared part and its own in one text."""
    parts = []
    for name in ("plain_data", side):
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(("from services.", "from __future__"))]
        parts.append("\n".join(lines))
    return "from __future__ import annotations\n" + "\n".join(parts) + "\nmain()\n"
