"""Coroutines that run side by side: groups that fail as one, and one call for all callers that ask the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


async def gather_or_cancel(*awaitables: Awaitable[Value]) -> list[Value]:
    """Return the results in order. When one fails, the others are cancelled and ended before its error is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Coalesced(Generic[Value]):
    """A value that is computed once for all callers at the same time. Lives on one event loop."""

    def __init__(self, compute: Callable[[], Coroutine[Any, Any, Value]]) -> None:
        self._compute = compute
        self._running: asyncio.Task[Value] | None = None
        self._kept: tuple[float, Value] | None = None

    async def get(self, max_age_seconds: float = 0.0) -> Value:
        """Return the value if it is younger than `max_age_seconds`, else a new one; waiting callers share an error."""
        loop = asyncio.get_running_loop()
        if self._kept is not None and loop.time() - self._kept[0] < max_age_seconds:
            return self._kept[1]
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
            self._running.add_done_callback(_look_at_error)
        return await asyncio.shield(self._running)

    def forget(self) -> None:
        """Drop the kept value: the next caller gets a new one."""
        self._kept = None

    async def _run(self) -> Value:
        value = await self._compute()
        self._kept = asyncio.get_running_loop().time(), value
        return value


def _look_at_error(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging an error that nobody waited for any more."""
    if not task.cancelled():
        task.exception()
