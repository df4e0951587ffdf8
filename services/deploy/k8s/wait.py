"""Wait for files and services that other pods make: the command of the manifests' init containers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.base.errors import UnavailableError
from services.rpc.health_check import health_of

_POLL_SECONDS = 2.0


def wait_for(
    paths: Sequence[Path], addresses: Sequence[str], *, timeout_seconds: float, print_line: Callable[[str], None]
) -> None:
    """Return when all files are there and all addresses answer gRPC health with SERVING.

    Raises UnavailableError, naming what is missing, when that takes longer than the timeout.
    """
    deadline = time.monotonic() + timeout_seconds
    printed: list[str] = []
    while missing := _missing(paths, addresses):
        if missing != printed:
            print_line("waiting for " + ", ".join(missing))
            printed = missing
        if time.monotonic() > deadline:
            raise UnavailableError(f"not there after {timeout_seconds:.0f} s: {', '.join(missing)}")
        time.sleep(min(_POLL_SECONDS, timeout_seconds))


def _missing(paths: Sequence[Path], addresses: Sequence[str]) -> list[str]:
    missing = [str(path) for path in paths if not path.is_file()]
    for address in addresses:
        if (state := health_of(address, application="")) != "SERVING":
            missing.append(f"{address} ({state})")
    return missing
