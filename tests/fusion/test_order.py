"""The order of a stream: a permutation per epoch, dealt to ranks without loss or repetition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.v1 import fusion_pb2
from services.base.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.fusion.client import FusedWindow, StreamPart, StreamRequest
from services.fusion.order import OrderedWindow, StreamPlan
from services.fusion.parts import Part, Pool
from services.fusion.permutation import BlockPermutation
from services.wire.cursor import Cursor
from tests.fakes.services.plain_fusion import plain_fusion


def make_plan(**changes: Any) -> StreamPlan:
    values: dict[str, Any] = {"num_windows": 10, "seed": 1, "rank": 0, "world_size": 1, "num_epochs": 1} | changes
    return StreamPlan(split_fingerprint="f", **values)


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


def blocks_dealt(order: list[int], dealt: int, world_size: int, block: int) -> list[list[int]]:
    """The positions of an order from `dealt` on, block by block to one rank after the other: by enumeration."""
    shards: list[list[int]] = [[] for _ in range(world_size)]
    for position in range(dealt, len(order)):
        shards[(position // block - dealt // block) % world_size].append(order[position])
    return shards


@given(
    num_windows=st.integers(1, 120),
    block=st.integers(1, 9),
    attempts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None)
def test_whole_blocks_are_dealt_and_every_window_once_wherever_the_world_size_changes(
    num_windows: int, block: int, attempts: list[tuple[int, int]], seed: int
) -> None:
    """All ranks together stop at any window of the order, inside a block too, and go on in another number; within a
    part they may also be cut off one by one."""
    size = {"num_windows": num_windows, "block_windows": block, "seed": seed}
    alone = make_plan(**size)
    order = [step.index for step in alone.windows(None)]
    assert sorted(order) == list(range(num_windows))
    for start in range(0, num_windows // block * block, block):
        assert order[start] % block == 0
        assert order[start : start + block] == list(range(order[start], order[start] + block))
    received, dealt = [], 0
    for world_size, taken in attempts:
        cursor = Cursor(epoch=0, dealt=dealt, received=0, plan=alone.fingerprint)
        plans = [make_plan(**size, rank=rank, world_size=world_size) for rank in range(world_size)]
        steps = [list(plan.windows(cursor)) for plan in plans]
        expected = blocks_dealt(order, dealt, world_size, block)
        assert [[step.index for step in shard] for shard in steps] == expected
        for plan, shard in zip(plans, steps, strict=True):
            stop = min(taken, len(shard))
            assert list(plan.windows(shard[stop - 1].cursor if stop else cursor)) == shard[stop:]
        stop = min(dealt + taken, num_windows)
        received += order[dealt:stop]
        dealt = stop
    rest = Cursor(epoch=0, dealt=dealt, received=0, plan=alone.fingerprint)
    received += [step.index for step in alone.windows(rest)]
    assert sorted(received) == list(range(num_windows))


def test_blocks_move_and_their_order_is_part_of_the_plan() -> None:
    moved = [BlockPermutation(83, "k", 8)[position] for position in range(80)]
    assert moved[::8] != sorted(moved[::8])
    prints = {make_plan(block_windows=block).fingerprint for block in (1, 2, 8)}
    assert len(prints) == 3
    # Cursors that were given out before there were blocks stay valid where windows come one by one.
    assert make_plan().fingerprint == hashlib.sha256(b"f:1").hexdigest()[:16]


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=6), num_windows=st.integers(1, 400))
@settings(deadline=None)
def test_after_any_number_of_windows_every_pool_has_its_share_within_one_window(
    weights: list[int], num_windows: int
) -> None:
    part = Part(num_windows, tuple((f"pool-{number}", weight) for number, weight in enumerate(weights)))
    drawn = [0] * len(weights)
    for position in range(num_windows):
        pool, before = part.pattern[position]
        assert before == drawn[pool]
        drawn[pool] += 1
        for number, weight in enumerate(weights):
            assert abs(Fraction((position + 1) * weight, sum(weights)) - drawn[number]) < 1
    assert part.drawn() == {f"pool-{number}": count for number, count in enumerate(drawn)}


POOLS = {"a": Pool("print of a", 7), "b": Pool("print of b", 23)}
PARTS = (Part(20, (("", 1), ("a", 1))), Part(31, (("a", 3), ("b", 5), ("", 2))), Part(9, (("b", 1),)))


def by_part(windows: Iterable[OrderedWindow]) -> list[list[OrderedWindow]]:
    listed: list[list[OrderedWindow]] = [[] for _ in PARTS]
    for window in windows:
        listed[window.cursor.epoch].append(window)
    return listed


@given(
    block=st.integers(1, 4),
    attempts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30)), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_pools_are_drawn_once_per_pass_over_parts_ranks_and_world_sizes(
    block: int, attempts: list[tuple[int, int]]
) -> None:
    """In every part all ranks stop together at any window, and go on in another number."""
    size = {"num_windows": 10, "block_windows": block, "parts": PARTS, "pools": POOLS}
    plan = make_plan(**size)
    alone = list(plan.windows(None))
    sizes = {"": 10, "a": 7, "b": 23}
    drawn: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for window in alone:
        drawn[window.pool].append((window.pass_number, window.index))
    for name, windows in drawn.items():  # over all parts together
        passes = [pass_number for pass_number, _ in windows]
        assert passes == [number // sizes[name] for number in range(len(windows))]
        for number in set(passes[: len(passes) // sizes[name] * sizes[name]]):
            assert sorted(index for of, index in windows if of == number) == list(range(sizes[name]))
        assert len(set(windows)) == len(windows)
    for number, (part, order) in enumerate(zip(PARTS, by_part(alone), strict=True)):
        assert len(order) == part.num_windows
        dealt = 0
        for world_size, taken in attempts:
            cursor = Cursor(epoch=number, dealt=dealt, received=0, plan=plan.fingerprint)
            expected = blocks_dealt([*range(part.num_windows)], dealt, world_size, block)
            for rank, positions in enumerate(expected):
                shard = by_part(make_plan(**size, rank=rank, world_size=world_size).windows(cursor))[number]
                assert [(w.pool, w.pass_number, w.index) for w in shard] == [
                    (order[at].pool, order[at].pass_number, order[at].index) for at in positions
                ]
            dealt = min(dealt + taken, part.num_windows)


def test_every_pass_has_an_order_of_its_own() -> None:
    plan = make_plan(num_windows=40, parts=(Part(80),))
    order = [window.index for window in plan.windows(None)]
    assert sorted(order[:40]) == sorted(order[40:]) and order[:40] != order[40:]
    epochs = make_plan(num_windows=40, num_epochs=2)
    assert [window.index for window in epochs.windows(None)] == order
    assert plan.fingerprint != epochs.fingerprint


def test_a_cursor_belongs_to_the_parts_and_to_the_windows_of_their_pools() -> None:
    size = {"parts": PARTS, "pools": POOLS}
    prints = {
        *(make_plan(**changes).fingerprint for changes in ({}, size, size | {"parts": PARTS[:2]})),
        make_plan(**size | {"parts": (*PARTS[:2], Part(9, (("b", 2), ("a", 1))))}).fingerprint,
        make_plan(**size | {"pools": POOLS | {"b": Pool("another print", 23)}}).fingerprint,
    }
    assert len(prints) == 5
    end = Cursor(epoch=3, dealt=0, received=0, plan=make_plan(**size).fingerprint)
    assert list(make_plan(**size).windows(end)) == []


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
        ({"parts": (Part(0),)}, r"parts\[0\]\.num_windows"),
        ({"parts": (Part(1), Part(1, ()))}, r"parts\[1\]\.pools"),
        ({"parts": (Part(1, (("", 1), ("", 2))),)}, r"parts\[0\]\.pools"),
        ({"parts": (Part(1, (("", 0),)),)}, r"parts\[0\]\.pools\.weight"),
        ({"parts": (Part(1, (("nowhere", 1),)),)}, r"parts\[0\]\.pools\.split"),
        ({"parts": (Part(1, (("", 9999), ("a", 2))),), "pools": POOLS}, r"parts\[0\]\.pools\.weight"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], field: str) -> None:
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


class PartsAndEpochs(StreamRequest):
    def to_proto(self) -> fusion_pb2.StreamFusedOpen:
        opening = super().to_proto()
        opening.num_epochs = 2
        return opening


def test_a_service_streams_parts_of_several_splits_and_resumes_in_any_of_them(tmp_path: Path) -> None:
    with plain_fusion(tmp_path) as fusion:
        corpus, client = Corpus.open(fusion.recipe.corpus_folder), fusion.client()
        sizes = {split: corpus.num_windows(split) for split in (TRAIN, HELD_OUT)}
        parts = (
            StreamPart(30, ((TRAIN, 1),)),
            StreamPart(2 * sizes[HELD_OUT] + 10, ((TRAIN, 1), (HELD_OUT, 1))),
            StreamPart(sizes[TRAIN], ((HELD_OUT, 1), (TRAIN, 3))),
        )
        request = StreamRequest("words", TRAIN, seed=4, parts=parts, tokens_only=True)
        windows = list(client.stream(request))
        found = [(window.cursor.epoch, window.pool, window.pass_number, window.index) for window in windows]
        mixed = Part(parts[1].num_windows, (("", 1), (HELD_OUT, 1)))
        expected = make_plan(
            num_windows=sizes[TRAIN],
            seed=4,
            parts=(Part(30), mixed, Part(sizes[TRAIN], ((HELD_OUT, 1), ("", 3)))),
            pools={HELD_OUT: Pool("", sizes[HELD_OUT])},
        )
        assert found == [(w.cursor.epoch, w.pool, w.pass_number, w.index) for w in expected.windows(None)]
        assert {number for _, pool, number, _ in found if pool == HELD_OUT} > {0, 1}
        for window in windows:
            ledger = corpus.window(window.pool or TRAIN, window.index)
            assert isinstance(window, FusedWindow)
            assert (window.block.text_bytes, window.document) == (ledger.text, ledger.document)
        for stop in (1, 30, 31, 30 + parts[1].num_windows + 5):
            resumed = client.stream(replace(request, cursor=windows[stop - 1].cursor))
            assert [window.cursor for window in resumed] == [window.cursor for window in windows[stop:]]
        with pytest.raises(FailedPreconditionError, match=r"cursor\.plan"):
            next(client.stream(replace(request, parts=parts[:2], cursor=windows[0].cursor)))
        with pytest.raises(NotFoundError, match=r"parts\[0\]\.pools\.split: 'train/no' is not known"):
            next(client.stream(replace(request, parts=(StreamPart(1, (("train/no", 1),)),))))
        with pytest.raises(InvalidArgumentError, match="num_epochs: a stream has either epochs or parts"):
            next(client.stream(PartsAndEpochs("words", TRAIN, seed=4, parts=parts)))
        with pytest.raises(InvalidArgumentError, match=r"parts\[0\]\.num_windows: must be at least 1"):
            next(client.stream(replace(request, parts=(StreamPart(0, ((TRAIN, 1),)),))))
