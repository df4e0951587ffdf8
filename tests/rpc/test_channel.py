"""Channels: a call may stay quiet for as long as its deadline allows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from services.rpc import channel as channels
from services.rpc.channel import KEEPALIVE_MS, SERVER_MIN_PING_MS, open_channel

SCALE = 200
"""How much faster these tests are than the clock of gRPC's rules."""


@contextmanager
def quiet_server(answer_now: threading.Event) -> Iterator[str]:
    """A server with gRPC's rules for pings at a faster clock, whose one method answers when it is told to."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        answer_now.wait(60)
        return request

    server = grpc.server(
        futures.ThreadPoolExecutor(2),
        options=[("grpc.http2.min_ping_interval_without_data_ms", SERVER_MIN_PING_MS // SCALE)],
    )
    handler = grpc.method_handlers_generic_handler("quiet", {"Answer": grpc.unary_unary_rpc_method_handler(answer)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        answer_now.set()
        server.stop(None).wait()


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the keepalive of all channels, given at the real clock."""

    def set_keepalive(keepalive_ms: int) -> None:
        options = dict(channels._OPTIONS) | {"grpc.keepalive_time_ms": keepalive_ms // SCALE}
        options["grpc.http2.max_pings_without_data"] = 0  # else gRPC sends one a minute, at the real clock
        monkeypatch.setattr(channels, "_OPTIONS", list(options.items()))

    return set_keepalive


def quiet_call(quiet_seconds: float) -> grpc.StatusCode:
    """The status of a call that is answered after a silence."""
    answer_now = threading.Event()
    with quiet_server(answer_now) as address, open_channel(address) as channel:
        call = channel.unary_unary("/quiet/Answer").future(b"x", timeout=60)
        threading.Timer(quiet_seconds, answer_now.set).start()
        call.exception()  # waits for the end of the call
        code: grpc.StatusCode = call.code()
        return code


def test_a_call_may_be_quiet_for_longer_than_the_keepalive(faster: Callable[[int], None]) -> None:
    faster(KEEPALIVE_MS)
    assert quiet_call(1600 / SCALE) == grpc.StatusCode.OK


def test_pings_of_a_minute_would_end_it(faster: Callable[[int], None]) -> None:
    faster(60_000)
    assert quiet_call(1600 / SCALE) == grpc.StatusCode.UNAVAILABLE
