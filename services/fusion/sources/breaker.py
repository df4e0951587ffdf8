"""A circuit breaker that leaves out a failing source and tries it again, and a budget for retries.

The breaker is closed as long as the source answers. It opens after a number of failures in a row, or at once when a
deadline was missed: each further window would wait for that long. While it is open the source counts as missing without
being asked. After a pause a trial runs beside the windows, so that none of them waits for it, and closes the breaker or
leaves it open for another pause.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Literal

from services.base.errors import DeadlineExceededError, ServiceError, UnavailableError

logger = logging.getLogger("ray.serve")

State = Literal["closed", "open", "half-open"]

RETRY_BURST = 256
"""Number of retries that need no budget: a stream that breaks costs each of its windows under way one."""


class Breaker:
    """The breaker of one source, on one event loop. `trial` asks it for something small, and raises ServiceError."""

    def __init__(self, name: str, trial: Callable[[], Awaitable[None]], *, failures: int, pause_seconds: float) -> None:
        self._name = name
        self._trial = trial
        self._limit = failures
        self._pause_seconds = pause_seconds
        self._in_a_row = 0
        self._problem: BaseException | None = None
        self._retry_at = 0.0
        self._trying: asyncio.Task[None] | None = None
        self._last: BaseException | None = None

    @property
    def state(self) -> State:
        if self._problem is None:
            return "closed"
        return "half-open" if self._trying is not None and not self._trying.done() else "open"

    def check(self) -> None:
        """Raise UnavailableError while the breaker is open, and start a trial when it is time for one."""
        if self._problem is None:
            return
        loop = asyncio.get_running_loop()
        if self.state == "open" and loop.time() >= self._retry_at:
            self._trying = loop.create_task(self._try())
        raise UnavailableError(f"source {self._name} is left out until a trial succeeds: {self._problem}")

    def succeeded(self) -> None:
        """Set the number of failures in a row back to 0."""
        self._in_a_row = 0

    def failed(self, error: BaseException) -> bool:
        """Count a failure; return False for an error that was counted before.

        A stream that breaks fails all its texts with one error, which counts once.
        """
        if error is self._last:
            return False
        self._last = error
        self._in_a_row += 1
        if self._problem is None and (self._in_a_row >= self._limit or isinstance(error, DeadlineExceededError)):
            self._open(error)
        return True

    async def close(self) -> None:
        """End a trial that is under way."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)

    def _open(self, error: BaseException) -> None:
        if self._problem is None:
            logger.warning("source %s is left out from now on: %s", self._name, error)
        self._problem = error
        pause = self._pause_seconds * random.uniform(0.75, 1.25)  # many services do not try at the same moment
        self._retry_at = asyncio.get_running_loop().time() + pause

    async def _try(self) -> None:
        try:
            await self._trial()
        except ServiceError as error:
            self._open(error)
        except BaseException as error:
            self._open(error)
            raise
        else:
            logger.info("source %s takes part again", self._name)
            self._problem, self._in_a_row = None, 0


class RetryBudget:
    """A bound on retries: at most a share of the texts asked for, so that an outage does not multiply the load."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._left = float(RETRY_BURST)

    def asked(self) -> None:
        """Count a text that is asked for."""
        self._left = min(float(RETRY_BURST), self._left + self._share)

    def take(self) -> bool:
        """Use up one retry; return False when none is left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
