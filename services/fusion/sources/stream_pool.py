"""Streams to one source, one to each of its replicas, shared by all callers that ask it for windows.

Serve places a stream on one replica for as long as it lasts, so that a single stream keeps a single replica busy,
however many there are. The pool cannot choose the replica, but a stream says where it has landed. While texts are
waiting, the pool opens streams on trial from time to time, as many as it has, keeps those that landed on a replica that
it did not know, and closes the others. A stream that ends, because its replica is drained or gone, leaves the pool; all
end after a while without a text, so that an idle source can be scaled down.

Texts go to the stream with the fewest unanswered ones, and wait in one queue while every stream has `_MOST_UNANSWERED`:
a faster replica takes more of them, and a text whose caller has gone before it was sent is never scored.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fusion_core.blocks import Block
from services.base.errors import DeadlineExceededError, ServiceError, UnavailableError
from services.source.client import ScoreStream
from services.wire.passage import Passage

logger = logging.getLogger("ray.serve")

_MOST_UNANSWERED = 64
"""Texts on a stream without an answer: enough for an engine's largest batch."""
_FIRST_LOOK_SECONDS = 1.0
_LONGEST_LOOK_SECONDS = 30.0
"""Time between two looks for further replicas: it doubles with every look that finds none."""
_LANDING_SECONDS = 5.0
"""Longest time in which a stream must name the replica that it has landed on."""
_IDLE_SECONDS = 60.0


@dataclass(eq=False, slots=True)
class _Member:
    """A stream of the pool, its texts without an answer, and when it last answered or began to owe one."""

    stream: ScoreStream
    unanswered: int = 0
    heard_at: float = 0.0
    silent: UnavailableError | None = None


@dataclass(eq=False, slots=True)
class _Asked:
    """A text, and its block to come."""

    passage: Passage
    answer: asyncio.Future[Block]


class StreamPool:
    """The streams to one source; `open_stream` makes one more. Lives on one event loop."""

    def __init__(self, open_stream: Callable[[], ScoreStream]) -> None:
        self._open_stream = open_stream
        self._members: list[_Member] = []
        self._unsent: deque[_Asked] = deque()
        self._look_pause = _FIRST_LOOK_SECONDS
        self._next_look = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def replicas(self) -> tuple[str, ...]:
        """The replicas that the streams have landed on; an empty name where a stream has not said it yet."""
        return tuple(member.stream.replica for member in self._members)

    async def score(self, passage: Passage) -> Block:
        """Return the block of a passage; raises ServiceError when its stream broke before the answer."""
        asked = _Asked(passage, asyncio.get_running_loop().create_future())
        self._unsent.append(asked)
        self._dispatch()
        return await asked.answer

    async def close(self) -> None:
        """End all streams; texts that wait for an answer fail."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        if self._looking is not None:
            self._looking.cancel()
        while self._unsent:
            self._unsent.popleft().answer.cancel()
        await asyncio.gather(*(member.stream.close() for member in self._members))
        await asyncio.gather(*self._background, return_exceptions=True)

    def _dispatch(self) -> None:
        """Send the texts that there is room for; called whenever a text comes or a stream has room again."""
        if self._closed:
            return
        now = asyncio.get_running_loop().time()
        for member in [member for member in self._members if member.stream.broken]:
            self._members.remove(member)
            self._in_background(member.stream.close())
        while self._unsent:
            if not self._members:
                self._members.append(_Member(self._open_stream()))
            member = min(self._members, key=lambda member: member.unanswered)
            if member.unanswered >= _MOST_UNANSWERED:
                break
            asked = self._unsent.popleft()
            if asked.answer.done():
                continue  # its caller has gone
            if member.unanswered == 0:
                member.heard_at = now
            member.unanswered += 1
            self._in_background(self._ask(member, asked))
        pending = len(self._unsent) + sum(member.unanswered for member in self._members)
        if pending > 1 and now >= self._next_look and (self._looking is None or self._looking.done()):
            self._looking = self._in_background(self._look_for_replicas())
        self._end_when_idle(pending)

    async def _ask(self, member: _Member, asked: _Asked) -> None:
        try:
            block = await member.stream.score(asked.passage)
        except ServiceError as error:
            if not asked.answer.done():
                asked.answer.set_exception(self._told_apart(member, error))
        except BaseException:
            asked.answer.cancel()
            raise
        else:
            member.heard_at = asyncio.get_running_loop().time()
            if not asked.answer.done():
                asked.answer.set_result(block)
        finally:
            member.unanswered -= 1
            self._dispatch()

    def _told_apart(self, member: _Member, error: ServiceError) -> ServiceError:
        """Return the error to raise: one replica that is silent while others answer is not the whole source."""
        others = [other for other in self._members if other is not member]
        if isinstance(error, DeadlineExceededError) and any(other.heard_at > member.heard_at for other in others):
            member.silent = member.silent or UnavailableError(str(error))
            return member.silent
        return error

    async def _look_for_replicas(self) -> None:
        """Open as many streams again as there are, and keep those that landed where none was before."""
        trials = [self._open_stream() for _ in range(max(1, len(self._members)))]
        kept: list[ScoreStream] = []
        try:
            known = await _landed([member.stream for member in self._members])
            if known and "" not in known:  # a source that does not say keeps its one stream
                for stream, replica in zip(trials, await _landed(trials), strict=True):
                    if replica and replica not in known:
                        known.append(replica)
                        kept.append(stream)
            self._members += map(_Member, kept)
        finally:
            for stream in trials:
                if stream not in kept:
                    self._in_background(stream.close())
            self._look_pause = _FIRST_LOOK_SECONDS if kept else min(2 * self._look_pause, _LONGEST_LOOK_SECONDS)
            self._next_look = asyncio.get_running_loop().time() + self._look_pause
        if kept:
            logger.info("%d more replicas found, %d streams now", len(kept), len(self._members))
            self._dispatch()

    def _end_when_idle(self, pending: int) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not pending and self._members:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._end_all)

    def _end_all(self) -> None:
        for member in self._members:
            self._in_background(member.stream.close())
        self._members.clear()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _landed(streams: list[ScoreStream]) -> list[str]:
    """Return the replicas of the streams; an empty name for one that does not say."""

    async def landed(stream: ScoreStream) -> str:
        try:
            async with asyncio.timeout(_LANDING_SECONDS):
                return await stream.landed()
        except TimeoutError:
            return ""

    return await asyncio.gather(*map(landed, streams))
