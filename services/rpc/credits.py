"""Credits: the number of blocks that the consumer of a stream is willing to take."""

from __future__ import annotations

import asyncio

from services.base.errors import InvalidArgumentError

MAX_CREDIT = 1 << 20


class Credits:
    """The blocks that the consumer is willing to take. One producer takes, one reader grants, on one event loop."""

    def __init__(self) -> None:
        self._granted = 0
        self._closed = False
        self._changed = asyncio.Event()

    def grant(self, blocks: int) -> None:
        """Add blocks; raises InvalidArgumentError unless 1 <= blocks and the sum stays below 2^20."""
        if blocks < 1 or self._granted + blocks > MAX_CREDIT:
            raise InvalidArgumentError(f"credit.blocks: must be 1 to {MAX_CREDIT} in sum, got {blocks}")
        self._granted += blocks
        self._changed.set()

    @property
    def exhausted(self) -> bool:
        return self._granted == 0

    def close(self) -> None:
        """Refuse all further credits, granted ones too."""
        self._closed = True
        self._changed.set()

    async def take(self) -> bool:
        """Wait for a credit and use it up; return False once the credits are closed."""
        while self._granted == 0 and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        if self._closed:
            return False
        self._granted -= 1
        return True
