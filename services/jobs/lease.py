"""A lease on a run: while one process trains it, a second one under the same name is refused.

Every holder keeps a file of its own in `.lease`, in the folder or URL that it writes to, and renews it. A holder writes
its file first and then looks for others, so that of two at the same moment at least one sees the other. The storage
needs no locks for that, only listings that show every written file.
"""

from __future__ import annotations

import _thread
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from services.base.errors import FailedPreconditionError
from services.base.files import Files
from services.base.retry import Backoff
from services.jobs.storage import STORAGE_KEY

logger = logging.getLogger(__name__)

_FOLDER = ".lease"
RENEW_SECONDS = 10.0
STALE_SECONDS = 45.0
"""Time without a renewal after which a holder on another machine counts as dead; no clocks are compared."""
_ATTEMPTS = 3


class LeaseLostError(FailedPreconditionError):
    """Another process took the lease, because this one did not renew it in time."""


@contextmanager
def held_leases(
    locations: Sequence[str],
    run_name: str,
    *,
    renew_seconds: float = RENEW_SECONDS,
    stale_seconds: float = STALE_SECONDS,
    interrupt: Callable[[], None] = _thread.interrupt_main,
) -> Iterator[None]:
    """Hold a run's lease at each of the locations, folders or URLs, for the length of the block.

    Leases of processes that have ended are taken over: on this machine at once, on another one after `stale_seconds`
    without a renewal. `interrupt` is called, from a thread, when the lease is lost; by default it
    interrupts the main thread.

    Raises FailedPreconditionError naming the holder of the lease, LeaseLostError at the end when it was lost.
    """
    leases: list[_Lease] = []
    with ExitStack() as stack:
        for location in dict.fromkeys(locations):
            lease = _Lease(location, run_name, renew_seconds, stale_seconds, interrupt)
            lease.take()
            stack.callback(lease.release)
            leases.append(lease)
        try:
            yield
        finally:
            if any(lease.lost for lease in leases):
                raise LeaseLostError(
                    f"run {run_name}: another process has taken it over, because this one stood still for longer than "
                    f"{stale_seconds:.0f} s; this one ends"
                )


class _Lease:
    def __init__(
        self, location: str, run_name: str, renew_seconds: float, stale_seconds: float, interrupt: Callable[[], None]
    ) -> None:
        self.lost = False
        self._files = Files(location, STORAGE_KEY)
        self._run_name = run_name
        self._renew_seconds, self._stale_seconds = renew_seconds, stale_seconds
        self._interrupt = interrupt
        self._path = f"{_FOLDER}/{uuid.uuid4().hex}.json"
        self._holder = _this_process() | {"since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run-lease", daemon=True)

    def take(self) -> None:
        """Write this process's file once no living process holds the run; raises FailedPreconditionError."""
        backoff = Backoff(0.2, longest_seconds=2.0)
        for attempt in range(_ATTEMPTS):
            for path in self._others():
                self._await_end(path)
            self._write()
            others = self._others()
            if not others:
                self._thread.start()
                return
            # Another process starts in the same moment. Both give way, and try again after different pauses.
            self._files.delete(self._path)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(backoff.next_pause())
        raise self._refusal(self._read(others[0]) or {})

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost:
            self._files.delete(self._path)

    def _await_end(self, path: str) -> None:
        """Delete the file of a holder that is gone; raise FailedPreconditionError when it lives."""
        first = self._read(path)
        if first is None:
            return
        if first.get("machine") == self._holder["machine"]:
            if _is_alive(first):
                raise self._refusal(first)
            logger.warning("run %s: the process that trained it (%s) is gone", self._run_name, _name(first))
            self._files.delete(path)
            return
        logger.warning("run %s: waiting to see whether %s still trains it", self._run_name, _name(first))
        watched_since = time.monotonic()
        while time.monotonic() - watched_since < self._stale_seconds:
            time.sleep(min(1.0, self._renew_seconds / 4))
            now = self._read(path)
            if now is None:
                return
            if now != first:
                raise self._refusal(now)
        logger.warning("run %s: %s has renewed nothing; its lease is taken over", self._run_name, _name(first))
        self._files.delete(path)

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_seconds):
            try:
                if self._files.read(self._path) is None:
                    self.lost = True
                    logger.error("run %s: the lease was taken over by another process", self._run_name)
                    self._interrupt()
                    return
                self._write()
            except Exception as error:  # whatever a store raises while it is away; the next renewal may succeed
                logger.warning("run %s: cannot renew the lease: %s", self._run_name, error)

    def _write(self) -> None:
        self._renewals += 1
        self._files.write(self._path, json.dumps(self._holder | {"renewals": self._renewals}).encode())

    def _read(self, path: str) -> dict[str, Any] | None:
        """Return the contents of a holder's file; None when it is gone."""
        data = self._files.read(path)
        if data is None:
            return None
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            return {}

    def _others(self) -> list[str]:
        paths = [f"{_FOLDER}/{name}" for name in self._files.sizes(_FOLDER)]
        return [path for path in paths if path != self._path]

    def _refusal(self, holder: dict[str, Any]) -> FailedPreconditionError:
        return FailedPreconditionError(
            f"run {self._run_name}: {_name(holder)} trains it since {holder.get('since', 'just now')} and holds its "
            f"lease in {self._files.location(_FOLDER)}; wait for its end, stop it, or choose another run name"
        )


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}"


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "machine": _machine(),
    }


def _machine() -> str:
    """Return a name for this start of this machine; in a container it names the container too.

    Process ids mean something only where the names are equal.
    """
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        return f"{socket.gethostname()} {boot.read_text().strip()} {namespace.readlink()}"
    except OSError:
        return socket.gethostname()


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        started: float = psutil.Process(holder["pid"]).create_time()
        return abs(started - float(holder["started"])) < 1.0
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
