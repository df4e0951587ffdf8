"""A real source without Ray: the servicer on a plain gRPC server in this process, counting what it is asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fusion.v1 import source_pb2_grpc
from services.base.errors import InvalidArgumentError
from services.source.config import SourceConfig
from services.source.servicer import SourceServicer
from tests.fakes.lies import Lie
from tests.fakes.services.on_thread import served


class PlainSource:
    """A running source: its address, the number of windows scored, and the largest number that it had at once.

    `hold_after` so many it answers nothing more. A text with `raises_on` in it comes back as the message of an
    exception. What it answers goes through `lie` on its way out, and every text that `refuses` is refused.
    """

    lie: Lie | None = None
    refuses: Callable[[bytes], bool] = staticmethod(lambda text: False)

    def __init__(self, raises_on: bytes | None = None) -> None:
        self.address = ""
        self._raises_on = raises_on
        self.scored = self.asked_who = 0
        self.at_once = self.most_at_once = 0
        self.hold_after: int | None = None
        self.answered = 0
        self.hold_answers_after: int | None = None
        self._holding = 0
        self._changed = threading.Condition()

    def count_infos(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(request: Any, grpc_context: Any) -> Any:
            self.asked_who += 1
            return await method(request, grpc_context)

        return counted

    def wrap_answers(self, settings: Callable[..., Any]) -> Callable[..., Any]:
        """Around what the servicer makes of a request's settings: the function from a text to its message."""

        def wrapped(request: Any) -> Any:
            answer = settings(request)

            async def lying(prompt: Any) -> Any:
                if self.refuses(prompt.text):
                    raise InvalidArgumentError("texts[0]: 0 tokens; accepts 1 to 2047")
                message = await answer(prompt)
                return message if self.lie is None else self.lie(message)

            return lying

        return wrapped

    def wait_until(self, holding: bool) -> None:
        """Returns when texts wait for an answer, or when none does: whoever asked is gone then."""
        with self._changed:
            assert self._changed.wait_for(lambda: (self._holding > 0) == holding, timeout=120)

    def wrap(self, score: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(prompt: Any, *args: Any) -> Any:
            if self._raises_on is not None and self._raises_on in prompt.text:
                raise RuntimeError(prompt.text.decode())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if self._full():
                    self._hold(1)
                    try:
                        while self._full():
                            await asyncio.sleep(0.01)
                    finally:
                        self._hold(-1)
                self.scored += 1
                return await score(prompt, *args)
            finally:
                self.at_once -= 1

        return counted

    def wrap_answer(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """Count the answers to prompts, and hold them back after `hold_answers_after`."""

        async def counted(*args: Any) -> Any:
            if self._answers_full():
                self._hold(1)
                try:
                    while self._answers_full():
                        await asyncio.sleep(0.01)
                finally:
                    self._hold(-1)
            self.answered += 1
            return await answer(*args)

        return counted

    def _answers_full(self) -> bool:
        return self.hold_answers_after is not None and self.answered >= self.hold_answers_after

    def _full(self) -> bool:
        return self.hold_after is not None and self.scored >= self.hold_after

    def _hold(self, more: int) -> None:
        with self._changed:
            self._holding += more
            self._changed.notify_all()


@contextmanager
def plain_source(config: SourceConfig, *, raises_on: bytes | None = None, port: int = 0) -> Iterator[PlainSource]:
    source = PlainSource(raises_on)

    def count(servicer: Any) -> None:
        servicer._scorer.score = source.wrap(servicer._scorer.score)
        servicer._answer = source.wrap_answers(servicer._answer)
        servicer._generator._answer = source.wrap_answer(servicer._generator._answer)
        servicer.GetSourceInfo = source.count_infos(servicer.GetSourceInfo)

    add = source_pb2_grpc.add_SourceServiceServicer_to_server
    with served(SourceServicer, add, config, change=count, port=port) as running:
        source.address = running.address
        yield source
