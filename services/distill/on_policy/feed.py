"""The fused rows of a worker's answers, asked for ahead of the steps that take them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.base.retry import Backoff
from services.wire.passage import Passage

logger = logging.getLogger(__name__)


@runtime_checkable
class TextFuser(Protocol):
    """The part of `services.fusion.client.FusionClient` that answers are fused by."""

    def fuse(
        self, texts: Sequence[bytes | Passage], *, k: int | None = None, sources: Sequence[str] = ()
    ) -> list[Block]: ...


class AnswerFeed:
    """Fused blocks of passages in their order; at most `in_flight` are asked for and not taken yet.

    A passage that too few sources answer for is asked for again for as long as `patience_seconds`; one that can never
    be fused comes as None.

    Attributes:
        wait_seconds: time spent waiting in `take`, in total.
    """

    def __init__(
        self,
        client: TextFuser,
        *,
        k: int | None,
        sources: Sequence[str],
        vocabulary: str,
        in_flight: int,
        patience_seconds: float = 300.0,
    ) -> None:
        """`vocabulary` is the fingerprint of the target's tokenizer, in which every block must come."""
        self.wait_seconds = 0.0
        self._client, self._k, self._sources, self._vocabulary = client, k, tuple(sources), vocabulary
        self._in_flight, self._patience_seconds = in_flight, patience_seconds
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="answer-feed")
        self._closed = threading.Event()
        self._passages: deque[Passage] = deque()
        self._asked: deque[Future[Block | None]] = deque()

    def put(self, passages: Sequence[Passage]) -> None:
        """Queue passages, and begin to ask for the first of them."""
        self._passages.extend(passages)
        self._ask()

    def take(self, count: int) -> list[Block | None]:
        """Return the blocks of the next `count` passages; raises what the service answered to one of them."""
        started, blocks = time.perf_counter(), []
        for _ in range(count):
            blocks.append(self._asked.popleft().result())
            self._ask()
        self.wait_seconds += time.perf_counter() - started
        return blocks

    def close(self) -> None:
        """Ask for nothing more, and let no thread wait to ask again."""
        self._closed.set()
        self._passages.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> None:
        while self._passages and len(self._asked) < self._in_flight:
            self._asked.append(self._threads.submit(self._fuse, self._passages.popleft()))

    def _fuse(self, passage: Passage) -> Block | None:
        backoff = Backoff(0.5, longest_seconds=5.0, patience_seconds=self._patience_seconds)
        while True:
            try:
                [block] = self._client.fuse([passage], k=self._k, sources=self._sources)
            except InvalidArgumentError as error:
                logger.warning("an answer of the target is left out: %s", error)
                return None
            except (UnavailableError, DeadlineExceededError):
                if backoff.exhausted or self._closed.wait(backoff.next_pause()):
                    raise
            else:
                if block.vocabulary != self._vocabulary:
                    raise FailedPreconditionError(
                        f"vocabulary: an answer's rows come in {block.vocabulary}, the target's tokenizer is "
                        f"{self._vocabulary}; the fusion service was started for another target"
                    )
                return block
