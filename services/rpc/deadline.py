"""The caller's deadline. Serve's proxy does not pass it to a replica, so it travels in the metadata as well.

A proxy that notices a passed deadline cancels the call at the replica, and with it the calls that the replica has made
to others. With the metadata a replica can answer in time with less.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar

from services.base.errors import InvalidArgumentError
from services.rpc.auth import Metadata

TIMEOUT_KEY = "fusion-timeout-ms"
"""Milliseconds that the caller waits, counted from when the call is sent: clocks may differ."""

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def timeout_metadata(timeout_seconds: float) -> Metadata:
    """Return metadata that tell the service how long the caller waits."""
    return ((TIMEOUT_KEY, str(max(1, int(1000 * timeout_seconds)))),)


def remaining_seconds() -> float | None:
    """Return how long the caller of the running method still waits, in seconds; None when it did not say."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())


@asynccontextmanager
async def caller_deadline(metadata: Iterable[tuple[str, str]]) -> AsyncIterator[None]:
    """Bound the handling of a call; raises TimeoutError when its caller waits no longer."""
    given = next((value for key, value in metadata if key == TIMEOUT_KEY), None)
    if given is None:
        yield
        return
    if not (given.isascii() and given.isdigit() and len(given) < 12):
        raise InvalidArgumentError(f"{TIMEOUT_KEY}: must be a number of milliseconds")
    deadline = asyncio.get_running_loop().time() + int(given) / 1000
    token = _deadline.set(deadline)
    try:
        async with asyncio.timeout_at(deadline):
            yield
    finally:
        _deadline.reset(token)
