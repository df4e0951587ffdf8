"""Tokens in flight: never above the bound, used up where possible, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.source.admission import Admission


@given(sizes=st.lists(st.integers(1, 100), max_size=60), seed=st.integers(0, 1000), share=st.floats(0, 0.5))
@settings(deadline=None, max_examples=100)
def test_the_bound_holds_and_all_get_through(sizes: list[int], seed: int, share: float) -> None:
    """Some callers give up, while they wait or while they hold; the bound is free again at the end."""

    async def run() -> None:
        rng, admission = random.Random(seed), Admission(100)
        inside, done = 0, []

        async def text(number: int) -> None:
            nonlocal inside
            async with admission.hold(sizes[number]):
                inside += sizes[number]
                assert inside <= admission.tokens_in_flight <= 100
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    inside -= sizes[number]
            done.append(number)

        tasks = [asyncio.create_task(text(number)) for number in range(len(sizes))]
        given_up = {number for number in range(len(sizes)) if rng.random() < share}
        for number in given_up:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            tasks[number].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        assert set(done) | given_up == set(range(len(sizes)))
        assert admission.tokens_in_flight == 0

    asyncio.run(run())


def test_small_texts_fill_the_gaps_but_a_large_one_is_not_starved() -> None:
    """A text of the whole bound waits behind one of half; small ones pass it, but no more than a bound's worth."""

    async def run() -> None:
        admission, order = Admission(100), []

        async def text(name: str, size: int, rounds: int = 1) -> None:
            async with admission.hold(size):
                order.append(name)
                for _ in range(rounds):
                    await asyncio.sleep(0)

        first = asyncio.create_task(text("half", 50, rounds=30))
        await asyncio.sleep(0)
        large = asyncio.create_task(text("large", 100))
        small = [asyncio.create_task(text(f"small {n}", 10)) for n in range(40)]
        await asyncio.gather(first, large, *small)
        passed = order.index("large") - 1
        assert 5 <= passed <= 10

    asyncio.run(run())
