"""The client against a scripted service: heartbeats, silence, versions, and services that break their word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fusion.v1 import block_pb2, fusion_pb2, fusion_pb2_grpc
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    NotServedError,
    UnavailableError,
)
from services.fusion.client import FusedWindow, FusionClient, SkippedWindow, StreamRequest
from services.rpc.deadline import TIMEOUT_KEY
from services.wire.block import encode_block
from services.wire.cursor import Cursor
from services.wire.protocol import PROTOCOL_VERSION
from tests.fakes.blocks import random_block

HEARTBEAT = fusion_pb2.StreamFusedResponse()
HELLO = fusion_pb2.StreamFusedResponse(protocol_version=PROTOCOL_VERSION)
REQUEST = StreamRequest("d", "train", seed=0)
SILENCE = 0.5


def frame(
    *indices: int,
    received: int,
    epoch: int = 0,
    drawn: int | None = None,
    skipped: Sequence[tuple[int, int]] = (),
) -> Any:
    """Blocks of the windows `indices`; `skipped` are pairs of position and index, `drawn` is the number of the pass."""

    def window(index: int) -> Any:
        return block_pb2.WindowRef(index=index, **{"pass": epoch if drawn is None else drawn})

    return fusion_pb2.StreamFusedResponse(
        blocks=[encode_block(random_block(2), window=window(index)) for index in indices],
        cursor=fusion_pb2.Cursor(epoch=epoch, received=received, plan="p"),
        skipped=[
            fusion_pb2.SkippedWindow(window=window(index), position=position, missing=["a"])
            for position, index in skipped
        ],
    )


class Scripted(fusion_pb2_grpc.FusionServiceServicer, health_pb2_grpc.HealthServicer):
    """Plays one script a stream: frames to send, seconds to wait, or a status to end with."""

    def __init__(self) -> None:
        self.scripts: list[list[Any]] = []
        self.opened: list[fusion_pb2.StreamFusedOpen] = []
        self.end = threading.Event()
        self.fuse_metadata: dict[str, str] = {}
        self.infos: list[grpc.StatusCode] = []
        self.own_errors = False

    def StreamFused(self, requests: Any, context: Any) -> Any:  # noqa: N802
        self.opened.append(next(requests).open)
        for step in self.scripts[len(self.opened) - 1]:
            if isinstance(step, float):
                self.end.wait(step)
            elif isinstance(step, grpc.StatusCode):
                self._abort(step, context)
            else:
                yield step

    def GetFusionInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.infos:
            self._abort(self.infos.pop(0), context)
        return fusion_pb2.GetFusionInfoResponse(strategy="fixed")

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.own_errors:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        return context.abort(grpc.StatusCode.NOT_FOUND, "Application 'fusion' not found.")

    def _abort(self, code: grpc.StatusCode, context: Any) -> None:
        context.abort(code, "scripted")

    def Fuse(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.fuse_metadata = dict(context.invocation_metadata())
        self.end.wait(30)
        return fusion_pb2.FuseResponse()


@pytest.fixture
def service() -> Iterator[tuple[Scripted, FusionClient]]:
    server, servicer = grpc.server(ThreadPoolExecutor(8)), Scripted()
    fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, FusionClient(f"127.0.0.1:{port}", patience_seconds=20, silence_seconds=SILENCE)
    servicer.end.set()
    server.stop(None)


def indices(client: FusionClient) -> list[int]:
    return [window.index for window in client.stream(REQUEST)]


def test_heartbeats_are_no_windows_and_keep_a_stream_alive(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    waiting = [0.2, HEARTBEAT] * 6  # more than the silence limit in sum
    servicer.scripts = [[HELLO, frame(4, 2, received=2), *waiting, frame(7, received=3), HEARTBEAT]]
    assert indices(client) == [4, 2, 7]
    assert len(servicer.opened) == 1


def test_silence_breaks_the_stream_and_it_resumes_behind_the_last_window(
    service: tuple[Scripted, FusionClient],
) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, frame(4, received=1), 60.0], [60.0], [HELLO, frame(2, received=2)]]
    started = time.monotonic()
    assert indices(client) == [4, 2]
    assert time.monotonic() - started < 20
    assert [Cursor.from_proto(request.cursor).received for request in servicer.opened] == [0, 1, 1]


def test_a_caller_that_takes_its_time_is_no_silence(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, frame(4, received=1), frame(2, received=2)]]
    stream = client.stream(REQUEST)
    assert next(stream).index == 4
    threading.Event().wait(3 * SILENCE)
    assert [window.index for window in stream] == [2]
    assert len(servicer.opened) == 1


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN]
)
def test_what_proxies_and_dying_replicas_send_is_retried(
    code: grpc.StatusCode, service: tuple[Scripted, FusionClient]
) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, frame(4, received=1), code], [HELLO, frame(2, received=2)]]
    assert indices(client) == [4, 2]


def test_an_application_that_is_still_starting_is_waited_for(service: tuple[Scripted, FusionClient]) -> None:
    """Serve's proxy answers NOT_FOUND until the application is there, health checks included."""
    servicer, client = service
    servicer.scripts = [[grpc.StatusCode.NOT_FOUND], [grpc.StatusCode.NOT_FOUND], [HELLO, frame(4, received=1)]]
    assert indices(client) == [4]
    servicer.infos = [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE]
    assert client.info().strategy == "fixed"
    assert servicer.infos == []


def test_an_application_that_never_comes_is_named_when_patience_ends(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    impatient = FusionClient(client.address, application="fusoin", patience_seconds=0)
    servicer.scripts, servicer.infos = [[grpc.StatusCode.NOT_FOUND]], [grpc.StatusCode.NOT_FOUND]
    with pytest.raises(NotServedError, match="fusoin at "):
        indices(impatient)
    with pytest.raises(NotServedError, match="fusoin at "):
        impatient.info()


def test_what_the_service_itself_does_not_find_is_final(service: tuple[Scripted, FusionClient]) -> None:
    """An application that answers health checks is there, and knows no such data set."""
    servicer, client = service
    servicer.own_errors = True
    servicer.scripts = [[grpc.StatusCode.NOT_FOUND], [HELLO, frame(4, received=1)]]
    with pytest.raises(NotFoundError, match="scripted"):
        indices(client)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1])
def test_another_version_is_refused_by_name(version: int, service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    servicer.scripts = [[fusion_pb2.StreamFusedResponse(protocol_version=version), frame(1, received=1)]]
    with pytest.raises(FailedPreconditionError, match=f"speaks {PROTOCOL_VERSION}, the service {version or 'one be'}"):
        indices(client)
    assert servicer.opened[0].protocol_version == PROTOCOL_VERSION


BROKEN_WORD = {
    "the same frame twice": [frame(4, received=1), frame(4, received=1)],
    "a window twice": [frame(4, received=1), frame(4, received=2)],
    "a window twice in a frame": [frame(4, 4, received=2)],
    "a pass that comes again": [frame(4, received=1, drawn=1), frame(5, received=2, drawn=0)],
    "a gap": [frame(4, received=1), frame(5, received=3)],
    "backwards": [frame(4, 5, received=2), frame(6, received=1)],
    "an epoch left out": [frame(4, received=1), frame(5, received=1, epoch=2)],
    "not from the start": [frame(4, received=2)],
    "skipped outside the frame": [frame(4, received=2, skipped=[(2, 5)])],
    "skipped twice in one place": [frame(4, received=3, skipped=[(0, 5), (0, 6)])],
    "a skipped window sent again": [frame(received=1, skipped=[(0, 5)]), frame(5, received=2)],
}


@pytest.mark.parametrize("case", BROKEN_WORD)
def test_a_service_that_breaks_its_word_is_refused(case: str, service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, *BROKEN_WORD[case]]]
    with pytest.raises(FailedPreconditionError, match=r"stream: "):
        indices(client)


def test_a_duplicate_is_refused_over_a_reconnection(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, frame(4, received=1), grpc.StatusCode.UNAVAILABLE], [HELLO, frame(4, received=2)]]
    with pytest.raises(FailedPreconditionError, match="window 4 comes twice"):
        indices(client)


def test_skipped_windows_stand_where_they_were(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    servicer.scripts = [[HELLO, frame(1, 2, received=4, skipped=[(0, 8), (2, 9)]), frame(8, received=1, epoch=1)]]
    windows = list(client.stream(REQUEST))
    assert [(type(window), window.index, window.cursor.received) for window in windows] == [
        (SkippedWindow, 8, 1),
        (FusedWindow, 1, 2),
        (SkippedWindow, 9, 3),
        (FusedWindow, 2, 4),
        (FusedWindow, 8, 1),
    ]
    assert isinstance(windows[0], SkippedWindow)
    assert windows[0].missing == ("a",)


def test_patience_ends(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    impatient = FusionClient(client.address, patience_seconds=0, silence_seconds=SILENCE)
    servicer.scripts = [[60.0]] * 3
    with pytest.raises(UnavailableError, match="not even a heartbeat"):
        list(impatient.stream(REQUEST))


def test_a_call_has_a_deadline_and_says_so(service: tuple[Scripted, FusionClient]) -> None:
    servicer, client = service
    with pytest.raises(DeadlineExceededError):
        FusionClient(client.address, timeout_seconds=0.5).fuse([b"text"])
    assert 0 < int(servicer.fuse_metadata[TIMEOUT_KEY]) <= 500
