"""When a source is left out and when it is asked again; how many retries there are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.base.errors import DeadlineExceededError, UnavailableError
from services.fusion.sources.breaker import RETRY_BURST, Breaker, RetryBudget


class Patient:
    """What the breaker tries: waits until told how the trial ends."""

    def __init__(self) -> None:
        self.tried = 0
        self.outcome: asyncio.Queue[bool] = asyncio.Queue()

    async def trial(self) -> None:
        self.tried += 1
        if not await self.outcome.get():
            raise UnavailableError("still down")


def with_breaker(run: Callable[[Breaker, Patient], Awaitable[None]], *, pause_seconds: float = 0.0) -> None:
    async def main() -> None:
        patient = Patient()
        breaker = Breaker("s", patient.trial, failures=3, pause_seconds=pause_seconds)
        async with asyncio.timeout(10):
            await run(breaker, patient)
        await breaker.close()

    asyncio.run(main())


async def settle(breaker: Breaker, state: str) -> None:
    while breaker.state != state:
        await asyncio.sleep(0)


def test_opens_after_failures_in_a_row_and_closes_after_a_good_trial() -> None:
    async def run(breaker: Breaker, patient: Patient) -> None:
        for _ in range(2):
            breaker.failed(UnavailableError("down"))
        breaker.succeeded()
        for _ in range(2):
            breaker.failed(UnavailableError("down"))
        breaker.check()
        breaker.failed(UnavailableError("down"))
        for _ in range(5):
            with pytest.raises(UnavailableError, match="source s is left out until a trial succeeds: down"):
                breaker.check()
        assert breaker.state == "half-open"
        patient.outcome.put_nowait(False)
        await settle(breaker, "open")
        assert patient.tried == 1  # one at a time, however many windows ask
        with pytest.raises(UnavailableError, match="still down"):
            breaker.check()
        patient.outcome.put_nowait(True)
        await settle(breaker, "closed")
        breaker.check()
        breaker.failed(UnavailableError("down"))  # counted anew
        breaker.check()

    with_breaker(run)


def test_a_missed_deadline_opens_at_once() -> None:
    async def run(breaker: Breaker, patient: Patient) -> None:
        breaker.failed(DeadlineExceededError("late"))
        assert breaker.state == "open"

    with_breaker(run)


def test_one_broken_stream_is_one_failure() -> None:
    async def run(breaker: Breaker, patient: Patient) -> None:
        broken = UnavailableError("stream")
        assert [breaker.failed(broken) for _ in range(20)] == [True] + 19 * [False]
        assert breaker.state == "closed"

    with_breaker(run)


def test_no_trial_before_the_pause_is_over() -> None:
    async def run(breaker: Breaker, patient: Patient) -> None:
        breaker.failed(DeadlineExceededError("late"))
        for _ in range(3):
            with pytest.raises(UnavailableError):
                breaker.check()
            await asyncio.sleep(0)
        assert (breaker.state, patient.tried) == ("open", 0)

    with_breaker(run, pause_seconds=3600)


@given(share=st.floats(0, 1), asked=st.lists(st.integers(0, 200), max_size=20))
def test_retries_stay_within_the_budget(share: float, asked: list[int]) -> None:
    budget, retries = RetryBudget(share), 0
    for number in asked:
        for _ in range(number):
            budget.asked()
        retries += sum(budget.take() for _ in range(300))
    assert retries <= RETRY_BURST + share * sum(asked) + 1e-6
