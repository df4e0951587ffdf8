"""Decide which text enters the engine next: as many tokens as fit, and no text waits for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Admission:
    """A bound on the tokens that an engine holds at once.

    Texts enter in the order of their arrival, but smaller ones overtake a text that does not fit yet, so that no part
    of the bound stays idle. Once `max_tokens` tokens have overtaken the text at the head of the queue, all others wait
    until it fits: no text waits for longer than about two rounds of the engine.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._free = max_tokens
        self._passed = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def tokens_in_flight(self) -> int:
        return self.max_tokens - self._free

    @asynccontextmanager
    async def hold(self, num_tokens: int) -> AsyncIterator[None]:
        """Wait for room for a text, and keep it as long as the `with` block runs."""
        assert num_tokens <= self.max_tokens
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (num_tokens, ready)
        self._waiting.append(entry)
        self._admit()
        try:
            await ready
            yield
        finally:
            if ready.cancelled():
                if entry in self._waiting:
                    self._remove(entry)
            else:
                self._free += num_tokens
            self._admit()

    def _admit(self) -> None:
        for entry in list(self._waiting):
            num_tokens, ready = entry
            is_head = entry is self._waiting[0]
            if ready.cancelled():
                self._remove(entry)
            elif num_tokens <= self._free and (is_head or self._passed + num_tokens <= self.max_tokens):
                self._remove(entry)
                self._passed += 0 if is_head else num_tokens
                self._free -= num_tokens
                ready.set_result(None)
            if self._free == 0:
                break

    def _remove(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        if entry is self._waiting[0]:
            self._passed = 0
        self._waiting.remove(entry)
