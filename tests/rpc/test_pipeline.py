"""Credits: nothing is computed that was not granted, results keep their order, failures end the stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.base.errors import InvalidArgumentError
from services.rpc.pipeline import FRAME_BYTES, Pipeline


async def count_to(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def forever() -> None:
    await asyncio.Event().wait()


@given(num_items=st.integers(0, 60), grants=st.lists(st.integers(1, 9), max_size=12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_in_order_and_never_more_than_granted(num_items: int, grants: list[int], seed: int) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        started = granted = received = 0

        async def compute(item: int) -> int:
            nonlocal started
            started += 1
            assert started <= granted
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            return item

        pipeline = Pipeline(count_to(num_items), compute, size=lambda item: 100)

        async def read() -> None:
            nonlocal granted
            for grant in grants:
                granted += grant
                pipeline.credits.grant(grant)
                await asyncio.sleep(0)

        async for frame in pipeline.frames(read):
            assert frame == list(range(received, received + len(frame)))
            received += len(frame)
        # The client has closed its side: the stream ends once everything that it paid for is sent.
        assert received == min(num_items, sum(grants))

    asyncio.run(run())


def test_frames_stay_near_their_size() -> None:
    async def run() -> None:
        async def compute(item: int) -> int:
            return item

        pipeline = Pipeline(count_to(50), compute, size=lambda item: FRAME_BYTES // 4)
        pipeline.credits.grant(50)
        assert max([len(frame) async for frame in pipeline.frames(forever)]) <= 4

    asyncio.run(run())


@pytest.mark.parametrize(("granted", "together"), [(8, 1), (64, 8)])
def test_a_frame_waits_for_an_eighth_of_what_is_under_way(granted: int, together: int) -> None:
    """Results that come one at a time: with few under way each goes out at once, with many some go together."""

    async def run() -> None:
        finish = [asyncio.Event() for _ in range(granted)]

        async def compute(item: int) -> int:
            await finish[item].wait()
            return item

        pipeline = Pipeline(count_to(granted), compute, size=lambda item: 1)
        pipeline.credits.grant(granted)
        frames = pipeline.frames(forever)
        coming = asyncio.ensure_future(anext(frames))
        for number in range(together):
            assert not coming.done()
            finish[number].set()
            await asyncio.sleep(0)
        assert await coming == list(range(together))
        # What does not come is not waited for.
        finish[together].set()
        assert await asyncio.wait_for(anext(frames), 10) == [together]
        await frames.aclose()

    asyncio.run(run())


def test_results_that_must_not_share_a_frame_do_not() -> None:
    async def run() -> None:
        async def compute(item: int) -> int:
            return item

        pipeline = Pipeline(count_to(30), compute, lambda item: 1, lambda before, after: before // 10 == after // 10)
        pipeline.credits.grant(30)
        async for frame in pipeline.frames(forever):
            assert len({item // 10 for item in frame}) == 1

    asyncio.run(run())


def test_failures_end_the_stream() -> None:
    async def run(reader_fails: bool) -> None:
        async def compute(item: int) -> int:
            if item == 3 and not reader_fails:
                raise RuntimeError("compute")
            return item

        async def read() -> None:
            await asyncio.sleep(0)
            if reader_fails:
                raise RuntimeError("reader")
            await forever()

        pipeline = Pipeline(count_to(10), compute, size=lambda item: 1)
        pipeline.credits.grant(2 if reader_fails else 10)
        received: list[int] = []
        with pytest.raises(RuntimeError, match="reader" if reader_fails else "compute"):
            async for frame in pipeline.frames(read):
                received += frame
        assert received == list(range(len(received)))
        assert len(received) <= 3

    asyncio.run(run(reader_fails=True))
    asyncio.run(run(reader_fails=False))


def test_leaving_early_cancels_what_is_under_way() -> None:
    async def run() -> None:
        cancelled = 0

        async def compute(item: int) -> int:
            nonlocal cancelled
            if item == 0:
                return item
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise
            return item

        pipeline = Pipeline(count_to(5), compute, size=lambda item: 1)
        pipeline.credits.grant(5)
        frames = pipeline.frames(forever)
        assert await anext(frames) == [0]
        await frames.aclose()
        assert cancelled == 4

    asyncio.run(run())


@pytest.mark.parametrize("blocks", [0, -1, 1 << 21])
def test_senseless_credit_is_refused(blocks: int) -> None:
    async def compute(item: int) -> int:
        return item

    pipeline = Pipeline(count_to(1), compute, size=lambda item: 1)
    with pytest.raises(InvalidArgumentError, match=r"credit\.blocks"):
        pipeline.credits.grant(blocks)


def test_a_heartbeat_is_an_empty_frame_while_nothing_can_be_sent() -> None:
    async def run() -> None:
        ready = asyncio.Event()

        async def compute(item: int) -> int:
            await ready.wait()
            return item

        pipeline = Pipeline(count_to(3), compute, size=lambda item: 1, heartbeat_seconds=0.01)
        frames = pipeline.frames(forever)
        assert [await anext(frames) for _ in range(3)] == [[], [], []]  # no credit yet
        pipeline.credits.grant(3)
        assert await anext(frames) == []  # the item waits
        ready.set()
        received = [item async for frame in frames for item in frame]
        assert received == [0, 1, 2]

    asyncio.run(run())


@given(begun=st.integers(0, 8), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=30)
def test_stopping_sends_what_was_begun_and_begins_nothing_more(begun: int, seed: int) -> None:
    async def run() -> None:
        rng, started = random.Random(seed), 0

        async def compute(item: int) -> int:
            nonlocal started
            started += 1
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            return item

        pipeline = Pipeline(count_to(20), compute, size=lambda item: 1)
        if begun:
            pipeline.credits.grant(begun)

        async def read() -> None:
            while started < begun:
                await asyncio.sleep(0)
            pipeline.stop()
            pipeline.credits.grant(5)
            await forever()

        received = [item async for frame in pipeline.frames(read) for item in frame]
        assert received == list(range(begun))
        assert pipeline.stopped

    asyncio.run(run())


def test_a_stream_that_is_stopped_after_its_last_item_ends_well() -> None:
    async def run() -> None:
        async def compute(item: int) -> int:
            return item

        pipeline = Pipeline(count_to(3), compute, size=lambda item: 1)
        pipeline.credits.grant(3)
        frames = pipeline.frames(forever)
        received = await anext(frames)
        await asyncio.sleep(0)
        pipeline.stop()
        received += [item async for frame in frames for item in frame]
        assert (received, pipeline.stopped) == ([0, 1, 2], False)

    asyncio.run(run())
