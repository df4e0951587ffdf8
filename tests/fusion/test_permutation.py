"""Permutations place by place, and the order of a split too large to be drawn window by window."""

from __future__ import annotations

from itertools import islice
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.fusion.order import StreamPlan
from services.fusion.parts import MANY_WINDOWS, Part, Pool
from services.fusion.permutation import GroupPermutation, Permutation
from services.wire.cursor import Cursor


def make_plan(**changes: Any) -> StreamPlan:
    values: dict[str, Any] = {"num_windows": 10, "seed": 1, "rank": 0, "world_size": 1, "num_epochs": 1} | changes
    return StreamPlan(split_fingerprint="f", **values)


@given(size=st.integers(1, 3000), key=st.text(max_size=8))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_every_position_once(size: int, key: str) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2000), block=st.integers(1, 4), blocks=st.integers(1, 20), key=st.text(max_size=4))
@settings(max_examples=30, deadline=None)
def test_an_order_in_groups_holds_every_number_once_and_touches_few_groups_at_a_time(
    size: int, block: int, blocks: int, key: str
) -> None:
    group = block * blocks
    permutation = GroupPermutation(size, key, block, group)
    order = [permutation[position] for position in range(size)]
    assert sorted(order) == list(range(size))
    assert [permutation[position] for position in reversed(range(size))] == order[::-1]
    for start in range(0, size, 8 * group):
        touched = {number // group for number in order[start : start + 8 * group]}
        assert len(touched) <= 9  # the last stretch has what is left behind the last whole group


def test_neighbours_of_a_large_split_come_near_each_other_in_an_order_of_their_own() -> None:
    many, group = MANY_WINDOWS + 77, 512
    plan = make_plan(num_windows=many, windows_per_group=group)
    order = [window.index for window in islice(plan.windows(None), 8 * group)]
    assert len(set(order)) == 8 * group
    assert len({index // group for index in order}) == len({index // group for index in order[:group]}) == 8
    turns = make_plan(num_windows=many, windows_per_group=group + 5, block_windows=8)
    blocks = [window.index for window in islice(turns.windows(None), 80)]
    assert blocks == [first + n for first in blocks[::8] for n in range(8)]
    assert all(first % 8 == 0 for first in blocks[::8]) and blocks[::8] != sorted(blocks[::8])
    small = make_plan(num_windows=MANY_WINDOWS, windows_per_group=group)
    assert small.fingerprint == make_plan(num_windows=MANY_WINDOWS).fingerprint
    assert len({window.index // group for window in islice(small.windows(None), 100)}) > 50


def test_a_cursor_from_before_there_were_groups_goes_on_in_the_order_that_it_had() -> None:
    size = {"num_windows": MANY_WINDOWS + 1, "num_epochs": 2}
    before, now = make_plan(**size), make_plan(**size, windows_per_group=512)
    assert now.fingerprint != before.fingerprint
    cursor = Cursor(epoch=0, dealt=MANY_WINDOWS - 3, received=0, plan=before.fingerprint)
    assert list(islice(now.windows(cursor), 20)) == list(islice(before.windows(cursor), 20))
    pools = {"a": Pool("print", MANY_WINDOWS + 1, 512)}
    parts = {"parts": (Part(20, (("", 1), ("a", 1))),)}
    assert (
        make_plan(**parts, pools=pools).fingerprint
        != make_plan(**parts, pools={"a": Pool("print", MANY_WINDOWS + 1)}).fingerprint
    )
