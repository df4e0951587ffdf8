"""All or none, and one for all."""

from __future__ import annotations

import asyncio

import pytest

from services.base.concurrency import Coalesced, gather_or_cancel


def test_results_come_in_order() -> None:
    async def late(value: int) -> int:
        await asyncio.sleep(0.01 * (3 - value))
        return value

    async def run() -> None:
        assert await gather_or_cancel(*map(late, range(3))) == [0, 1, 2]

    asyncio.run(run())


@pytest.mark.parametrize("from_outside", [False, True])
def test_no_sibling_outlives_a_failure_or_a_cancellation(from_outside: bool) -> None:
    async def run() -> None:
        running, ended, fail = 0, 0, asyncio.Event()

        async def waits() -> None:
            nonlocal running, ended
            running += 1
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # needs a moment to end
                ended += 1

        async def fails() -> None:
            await fail.wait()
            raise ValueError("one")

        gathering = asyncio.create_task(gather_or_cancel(waits(), fails(), waits()))
        while running < 2:
            await asyncio.sleep(0)
        gathering.cancel() if from_outside else fail.set()
        with pytest.raises(asyncio.CancelledError if from_outside else ValueError):
            await gathering
        assert ended == 2

    asyncio.run(run())


def test_those_who_ask_together_share_one_answer_or_one_error() -> None:
    async def run() -> None:
        computed = 0

        async def compute() -> int:
            nonlocal computed
            computed += 1
            await asyncio.sleep(0)
            if computed == 2:
                raise ValueError("second")
            return computed

        value = Coalesced(compute)
        assert await asyncio.gather(*(value.get() for _ in range(10))) == [1] * 10
        assert await value.get(max_age_seconds=60) == 1
        errors = await asyncio.gather(*(value.get() for _ in range(10)), return_exceptions=True)
        assert len({id(error) for error in errors}) == 1
        assert isinstance(errors[0], ValueError)
        assert await value.get(max_age_seconds=60) == 1  # a failure forgets nothing by itself
        value.forget()
        assert await value.get(max_age_seconds=60) == 3

    asyncio.run(run())


def test_who_stops_waiting_does_not_end_it_for_the_others() -> None:
    async def run() -> None:
        go = asyncio.Event()

        async def compute() -> str:
            await go.wait()
            return "there"

        value = Coalesced(compute)
        impatient, patient = asyncio.create_task(value.get()), asyncio.create_task(value.get())
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0)
        go.set()
        assert await patient == "there"

    asyncio.run(run())
