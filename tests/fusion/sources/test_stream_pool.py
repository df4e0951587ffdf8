"""The pool of streams to a source: every replica has one, as they come and go, and every text is answered once.

The replicas are servers of their own behind one address; gRPC gives each new channel one of those that are up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.base.errors import UnavailableError
from services.deploy.local_ray import free_port
from services.fusion.sources.stream_pool import StreamPool
from services.source.client import ScoreStream
from services.source.config import SourceConfig
from services.wire.passage import Passage
from tests.fakes.services.plain_source import PlainSource, plain_source
from tests.fakes.tiny_model import make_tiny_model

TOKENS_PER_SECOND = 400


class Replicas:
    """Replicas that can be started and ended, and the address of all of them."""

    def __init__(self, model: Path, num_replicas: int) -> None:
        self.ports = [free_port() for _ in range(num_replicas)]
        self.running: dict[int, tuple[PlainSource, ExitStack]] = {}
        synthetic = {"tokens_per_second": TOKENS_PER_SECOND}
        self._config = SourceConfig.model_validate(
            {"name": "s", "model": str(model), "engine": "synthetic", "top_k": 4, "synthetic": synthetic}
        )

    @property
    def address(self) -> str:
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def start(self, number: int) -> PlainSource:
        stack = ExitStack()
        source = stack.enter_context(plain_source(self._config, port=self.ports[number]))
        self.running[number] = source, stack
        return source

    def end(self, number: int) -> None:
        self.running.pop(number)[1].close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pool") / "model", vocabulary_size=400, seed=1)


@pytest.fixture
def replicas(model: Path) -> Iterator[Replicas]:
    made = Replicas(model, 3)
    yield made
    for number in list(made.running):
        made.end(number)


def with_pool(replicas: Replicas, run: Callable[[StreamPool], Awaitable[None]]) -> None:
    async def main() -> None:
        pool = StreamPool(lambda: ScoreStream(replicas.address, "s", top_k=4))
        try:
            async with asyncio.timeout(120):
                await run(pool)
        finally:
            await pool.close()

    asyncio.run(main())


async def keep_asking(pool: StreamPool, until: Callable[[], bool]) -> list[Passage]:
    """Has 16 texts under way until then; returns those that were answered, each with its own block."""
    asked, answered = iter(range(10**6)), []

    async def ask() -> None:
        while not until():
            passage = Passage(b"the man said %d" % next(asked))
            while True:
                try:
                    assert (await pool.score(passage)).text_bytes == passage.text
                except UnavailableError:  # its replica has gone: the caller asks again
                    await asyncio.sleep(0.05)
                else:
                    break
            answered.append(passage)

    await asyncio.gather(*(ask() for _ in range(16)))
    return answered


def test_a_lone_text_needs_one_stream(replicas: Replicas) -> None:
    replicas.start(0)

    async def run(pool: StreamPool) -> None:
        for _ in range(3):
            await pool.score(Passage(b"the man"))
        assert len(pool.replicas) == 1

    with_pool(replicas, run)


def test_every_replica_has_a_stream_also_those_that_come_later_and_none_when_it_is_gone(replicas: Replicas) -> None:
    first = replicas.start(0)

    async def run(pool: StreamPool) -> None:
        answered = await keep_asking(pool, lambda: first.scored > 20)
        assert len(pool.replicas) == 1
        second, third = replicas.start(1), replicas.start(2)
        answered += await keep_asking(
            pool, lambda: len(set(pool.replicas)) == 3 and min(second.scored, third.scored) > 9
        )
        before = [source.scored for source in (first, second, third)]
        answered += await keep_asking(pool, lambda: sum(s.scored for s in (first, second, third)) > sum(before) + 120)
        shares = [source.scored - was for source, was in zip((first, second, third), before, strict=True)]
        assert max(shares) < 1.5 * min(shares)  # each its part, at the same pace
        await asyncio.to_thread(replicas.end, 0)
        here = second.scored
        answered += await keep_asking(pool, lambda: len(pool.replicas) == 2 and second.scored > here + 20)
        assert len(answered) >= 200

    with_pool(replicas, run)


def test_a_text_whose_caller_has_gone_before_it_was_sent_is_not_scored(replicas: Replicas) -> None:
    source = replicas.start(0)
    source.hold_after = 0

    async def run(pool: StreamPool) -> None:
        asked = [asyncio.create_task(pool.score(Passage(b"text %d" % number))) for number in range(200)]
        while source.at_once < 64:
            await asyncio.sleep(0.01)
        for task in asked[1:]:
            task.cancel()
        source.hold_after = None
        await asked[0]
        await pool.score(Passage(b"the last"))
        assert source.scored == 65

    with_pool(replicas, run)
