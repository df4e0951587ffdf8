"""Pauses between the attempts of something that failed and may succeed later."""

from __future__ import annotations

import math
import random
import time


class Backoff:
    """Pauses that double, from `first_seconds` up to `longest_seconds`, each drawn from 0.5 to 1.5 times its length.

    The jitter keeps many clients of one service from coming back in the same moment. The caller sleeps, so that
    blocking and asynchronous code use the same object:

        backoff = Backoff(0.5, longest_seconds=5.0, patience_seconds=60.0)
        while True:
            try:
                return call()
            except UnavailableError:
                if backoff.exhausted:
                    raise
                time.sleep(backoff.next_pause())

    `patience_seconds` run from the start, and again from each `reset`.
    """

    def __init__(
        self, first_seconds: float = 0.5, *, longest_seconds: float = 15.0, patience_seconds: float = math.inf
    ) -> None:
        self._first_seconds = first_seconds
        self._longest_seconds = longest_seconds
        self._patience_seconds = patience_seconds
        self.reset()

    def reset(self) -> None:
        """Start again with the shortest pause and full patience, after an attempt that got somewhere."""
        self._seconds = self._first_seconds
        self._since = time.monotonic()

    @property
    def exhausted(self) -> bool:
        """Return whether nothing has succeeded for longer than `patience_seconds`."""
        return time.monotonic() - self._since > self._patience_seconds

    def next_pause(self) -> float:
        """Return the seconds to wait before the next attempt."""
        seconds = self._seconds * random.uniform(0.5, 1.5)
        self._seconds = min(2 * self._seconds, self._longest_seconds)
        return seconds
