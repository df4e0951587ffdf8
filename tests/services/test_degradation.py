"""Sources that freeze, slow down or go away: the stream goes on with the others, and says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fusion.v1 import fusion_pb2
from services.common.errors import DeadlineExceededError, UnavailableError
from services.fusion.client import FusedWindow, StreamRequest
from tests.services.plain_fusion import PlainFusion, plain_fusion

REQUEST = StreamRequest("words", "train", seed=1, num_epochs=3)
DEADLINE = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("degradation")


@pytest.fixture
def fusion(folder: Path) -> Iterator[PlainFusion]:
    with plain_fusion(folder, source_timeout_seconds=DEADLINE) as running:
        yield running


@pytest.fixture
def strict(folder: Path) -> Iterator[PlainFusion]:
    with plain_fusion(folder, source_timeout_seconds=60, min_sources=2) as running:
        yield running


def freeze(fusion: PlainFusion, number: int) -> None:
    fusion.sources[number].hold_after = fusion.sources[number].scored


def thaw(fusion: PlainFusion, number: int) -> None:
    fusion.sources[number].hold_after = None


def present(window: object) -> tuple[bool, ...]:
    assert isinstance(window, FusedWindow)
    assert sum(share.weight for share in window.block.shares) == pytest.approx(1, abs=1e-5)
    return tuple(share.present for share in window.block.shares)


def status_of(fusion: PlainFusion, number: int) -> fusion_pb2.SourceStatus:
    return fusion.client().info().sources[number]


def wait_for_breaker(fusion: PlainFusion, number: int, state: fusion_pb2.BreakerState) -> None:
    deadline = time.monotonic() + 20
    while status_of(fusion, number).breaker != state:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_frozen_source_costs_one_deadline_and_comes_back(fusion: PlainFusion) -> None:
    stream = fusion.client().stream(REQUEST, prefetch_windows=8)
    windows = [*islice(stream, 10)]
    assert {present(window) for window in windows} == {(True, True)}
    freeze(fusion, 1)
    started = time.monotonic()
    windows += islice(stream, fusion.num_windows)
    # Some were on their way; the first that waits costs the deadline, all behind it nothing.
    assert time.monotonic() - started < 3 * DEADLINE + 5
    assert present(windows[-1]) == (True, False)
    status = status_of(fusion, 1)
    assert status.breaker in {fusion_pb2.BREAKER_STATE_OPEN, fusion_pb2.BREAKER_STATE_HALF_OPEN}
    assert not status.serving
    assert status.timeouts == 1
    assert status.missing >= 1
    assert status_of(fusion, 0).serving
    thaw(fusion, 1)
    wait_for_breaker(fusion, 1, fusion_pb2.BREAKER_STATE_CLOSED)
    windows += stream
    assert present(windows[-1]) == (True, True)
    assert len(windows) == 3 * fusion.num_windows
    for epoch in range(3):
        indices = sorted(window.index for window in windows if window.cursor.epoch == epoch)
        assert indices == list(range(fusion.num_windows))


def test_a_caller_with_little_time_gets_what_there_is(fusion: PlainFusion) -> None:
    freeze(fusion, 1)
    [block] = fusion.client(timeout_seconds=0.6).fuse([b"the man said so"])
    assert [share.present for share in block.shares] == [True, False]
    # The caller's haste is not held against the source.
    assert status_of(fusion, 1).breaker == fusion_pb2.BREAKER_STATE_CLOSED
    thaw(fusion, 1)


def test_no_source_is_asked_behind_the_caller_s_deadline(strict: PlainFusion) -> None:
    freeze(strict, 1)
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        strict.client(timeout_seconds=0.6).fuse([b"the man said so"])
    assert time.monotonic() - started < 10
    strict.sources[1].wait_until(holding=False)
    thaw(strict, 1)
    assert [s.present for s in strict.client().fuse([b"the man said so"])[0].shares] == [True, True]


def test_below_quorum_a_stream_waits_and_goes_on_when_the_source_is_back(folder: Path) -> None:
    with plain_fusion(folder, source_timeout_seconds=DEADLINE, min_sources=2) as fusion:
        stream = fusion.client().stream(StreamRequest("words", "train", seed=1), prefetch_windows=4)
        windows = [*islice(stream, 5)]
        freeze(fusion, 0)
        wait_for_breaker_by_streaming(fusion)
        with pytest.raises(UnavailableError, match="source-0 is left out"):
            fusion.client().fuse([b"the man said so"])
        thaw(fusion, 0)
        windows += stream
        assert [present(window) for window in windows] == [(True, True)] * fusion.num_windows
        assert sorted(window.index for window in windows) == list(range(fusion.num_windows))


def wait_for_breaker_by_streaming(fusion: PlainFusion) -> None:
    """Somebody asks until the frozen source is found out."""
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        fusion.client(timeout_seconds=20).fuse([b"the man said so"])
