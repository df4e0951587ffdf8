"""Sources that freeze, slow down or go away: the stream goes on with the others, and says so."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc
from services.base.errors import DeadlineExceededError, UnavailableError
from services.fusion.client import FusedWindow, StreamRequest
from services.rpc.channel import open_channel
from tests.fakes.services.plain_fusion import PlainFusion, plain_fusion

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


def test_a_caller_with_little_time_gets_what_there_is(folder: Path) -> None:
    with plain_fusion(folder, source_timeout_seconds=60) as fusion:
        assert [share.present for share in fusion.client().fuse([b"the man"])[0].shares] == [True, True]
        freeze(fusion, 1)
        # A fifth of its time is left for fusing and the way back: much more than that takes.
        [block] = fusion.client(timeout_seconds=5).fuse([b"the man said so"])
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
        find_out(fusion)
        with pytest.raises(UnavailableError, match="source-0 is left out"):
            fusion.client().fuse([b"the man said so"])
        thaw(fusion, 0)
        windows += stream
        assert [present(window) for window in windows] == [(True, True)] * fusion.num_windows
        assert sorted(window.index for window in windows) == list(range(fusion.num_windows))


@pytest.mark.parametrize("prefetch", [1, 6])
def test_what_the_trainer_grants_bounds_what_sources_are_asked_for(prefetch: int, fusion: PlainFusion) -> None:
    """A trainer that takes its time slows the sources down, and no source runs ahead of the other."""
    stream = fusion.client().stream(REQUEST, prefetch_windows=prefetch)
    for taken in range(1, 30):
        next(stream)
        assert all(source.scored + source.at_once <= prefetch + taken for source in fusion.sources)
    deadline = time.monotonic() + 20
    while any(source.scored < prefetch + 28 for source in fusion.sources):  # all that was granted, and no more
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all(source.scored <= prefetch + 29 for source in fusion.sources)
    assert all(0 < source.most_at_once <= prefetch for source in fusion.sources)
    freeze(fusion, 0)
    fusion.sources[1].most_at_once = 0
    for _ in range(prefetch - 1):
        next(stream)
    assert fusion.sources[1].most_at_once <= prefetch
    thaw(fusion, 0)


def check(fusion: PlainFusion, service: str = "") -> int:
    with open_channel(fusion.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=20).status)


def test_ready_as_long_as_the_quorum_can_be_had_and_alive_in_any_case(folder: Path) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with plain_fusion(folder, source_timeout_seconds=DEADLINE, min_sources=2) as fusion:
        assert [check(fusion), check(fusion, "fusion.v1.FusionService"), check(fusion, "liveness")] == 3 * [serving]
        freeze(fusion, 0)
        find_out(fusion)
        assert check(fusion) == not_serving
        assert check(fusion, "fusion.v1.FusionService") == not_serving
        assert check(fusion, "liveness") == serving
        thaw(fusion, 0)
        wait_for_breaker(fusion, 0, fusion_pb2.BREAKER_STATE_CLOSED)
        assert check(fusion) == serving
    with plain_fusion(folder, source_timeout_seconds=DEADLINE, min_sources=1) as fusion:
        freeze(fusion, 0)
        fusion.client(timeout_seconds=20).fuse([b"the man said so"])
        assert check(fusion) == serving


def test_a_replica_that_is_stopped_sends_what_it_began_and_takes_no_more(fusion: PlainFusion) -> None:
    outbox: queue.SimpleQueue[fusion_pb2.StreamFusedRequest | None] = queue.SimpleQueue()
    outbox.put(fusion_pb2.StreamFusedRequest(open=REQUEST.to_proto()))
    outbox.put(fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=4)))
    with open_channel(fusion.address) as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        freeze(fusion, 0)
        frames = stub.StreamFused(iter(outbox.get, None), timeout=60)
        next(frames)
        fusion.sources[0].wait_until(holding=True)
        fusion.drain()
        outbox.put(fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=4)))
        thaw(fusion, 0)
        received = 0
        with pytest.raises(grpc.RpcError, match="draining") as caught:
            for frame in frames:
                received += len(frame.blocks)
        assert (caught.value.code(), received) == (grpc.StatusCode.UNAVAILABLE, 4)
        with pytest.raises(UnavailableError, match="draining"):
            next(fusion.client(patience_seconds=0).stream(REQUEST))


def find_out(fusion: PlainFusion) -> None:
    """Somebody asks until the frozen source is found out."""
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        fusion.client(timeout_seconds=20).fuse([b"the man said so"])
