"""The order of a stream: a permutation per epoch, dealt to ranks without loss or repetition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.base.errors import FailedPreconditionError, InvalidArgumentError
from services.fusion.order import Permutation, StreamPlan
from services.wire.cursor import Cursor


def make_plan(**changes: int) -> StreamPlan:
    values = {"num_windows": 10, "seed": 1, "rank": 0, "world_size": 1, "num_epochs": 1} | changes
    return StreamPlan(split_fingerprint="f", **values)


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_every_position_once(size: int, key: str) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int) -> list[int]:
        return [step.index for step in make_plan(num_windows=50, seed=seed, num_epochs=2).windows(None)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:50] != order(1)[50:]
    assert sorted(order(1)[:50]) == sorted(order(1)[50:]) == list(range(50))


@given(
    num_windows=st.integers(1, 200),
    worlds=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    stops=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None)
def test_every_window_arrives_once_whatever_the_world_sizes(
    num_windows: int, worlds: list[int], stops: list[int], seed: int
) -> None:
    """Ranks consume equally much, then the stream goes on with another world size; the last world reads to the end."""
    received: list[int] = []
    cursor: Cursor | None = None
    for number, world_size in enumerate(worlds):
        shards = [
            list(make_plan(num_windows=num_windows, seed=seed, rank=rank, world_size=world_size).windows(cursor))
            for rank in range(world_size)
        ]
        last = number == len(worlds) - 1
        take = min(stops[number], *map(len, shards))
        for shard in shards:
            received += [step.index for step in (shard if last else shard[:take])]
        if take:
            at = shards[0][take - 1].cursor
            cursor = replace(at, dealt=at.dealt + take * world_size, received=0)
    assert sorted(received) == list(range(num_windows))


@given(stop=st.integers(0, 30))
def test_resumed_stream_goes_on_where_it_stopped(stop: int) -> None:
    plan = make_plan(num_windows=11, num_epochs=3, rank=1, world_size=2)
    steps = list(plan.windows(None))
    stop = min(stop, len(steps))
    resumed = list(plan.windows(steps[stop - 1].cursor if stop else None))
    assert resumed == steps[stop:]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"world_size": 0}, "world_size"),
        ({"rank": 1}, "rank"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_windows": 0}, "split"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{field}: "):
        make_plan(**changes)


def test_cursor_of_another_plan_is_refused() -> None:
    cursor = next(make_plan(seed=1).windows(None)).cursor
    with pytest.raises(FailedPreconditionError, match=r"cursor\.plan"):
        make_plan(seed=2).windows(cursor)


@pytest.mark.parametrize("position", [{"dealt": 11}, {"received": 11}, {"epoch": 9}])
def test_cursor_outside_the_plan_is_refused(position: dict[str, int]) -> None:
    plan = make_plan()
    cursor = Cursor(**({"epoch": 0, "dealt": 0, "received": 0} | position), plan=plan.fingerprint)
    with pytest.raises(InvalidArgumentError, match="cursor"):
        plan.windows(cursor)
