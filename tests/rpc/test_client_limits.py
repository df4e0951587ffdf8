"""What one client may hold of a replica: refused beyond it, free again afterwards, and nobody else pays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.v1 import block_pb2, fusion_pb2
from services.base.errors import InvalidArgumentError, ResourceExhaustedError
from services.rpc.client_limits import ClientLimits, PerClient, client_of


def limits(**settings: int) -> ClientLimits:
    return ClientLimits(PerClient(**settings), "service.per_client")


def request(num_bytes: int) -> fusion_pb2.FuseRequest:
    made = fusion_pb2.FuseRequest(texts=[bytes(num_bytes - 10)])
    return fusion_pb2.FuseRequest(texts=[bytes(num_bytes - 10 + num_bytes - made.ByteSize())])


def credit(blocks: int) -> fusion_pb2.StreamFusedRequest:
    return fusion_pb2.StreamFusedRequest(credit=block_pb2.Credit(blocks=blocks))


def frame(blocks: int) -> fusion_pb2.StreamFusedResponse:
    return fusion_pb2.StreamFusedResponse(blocks=[block_pb2.TokenBlock()] * blocks)


async def given_in_turn(messages: Sequence[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def read(stream: Any, *messages: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [message async for message in stream.requests(given_in_turn(messages))]

    return asyncio.run(collect())


def test_a_client_is_a_token_on_a_host() -> None:
    def client(peer: str, token: str) -> str:
        return client_of(peer, (("application", "fusion"), ("authorization", f"Bearer {token}")))

    one = client("ipv4:10.0.0.1:5000", "a")
    assert client("ipv4:10.0.0.1:6000", "a") == one
    assert client("ipv4:10.0.0.2:5000", "a") != one
    assert client("ipv4:10.0.0.1:5000", "b") != one
    assert client("ipv6:[::1]:5000", "a") == client("ipv6:[::1]:5001", "a")


def test_streams_beyond_the_limit_are_refused_until_one_ends() -> None:
    subject = limits(streams=2)
    with ExitStack() as others:
        first = subject.stream("a")
        first.__enter__()
        others.enter_context(subject.stream("a"))
        with pytest.raises(ResourceExhaustedError, match=r"service\.per_client\.streams is 2"), subject.stream("a"):
            pass
        others.enter_context(subject.stream("b"))
        first.__exit__(None, None, None)
        others.enter_context(subject.stream("a"))
    assert subject.idle


def test_requests_beyond_the_limit_are_refused() -> None:
    subject = limits(request_bytes=1000)
    with pytest.raises(ResourceExhaustedError, match=r"1001 bytes; service\.per_client\.request_bytes is 1000"):
        subject.call("a", request(1001)).__enter__()
    with subject.call("a", request(600)):
        with pytest.raises(ResourceExhaustedError, match="401 bytes beside 600"):
            subject.call("a", request(401)).__enter__()
        with subject.call("a", request(400)), subject.call("b", request(1000)):
            pass
    with subject.stream("a") as stream, pytest.raises(ResourceExhaustedError, match="request_bytes"):
        read(stream, request(1001))
    assert subject.idle


def test_credits_of_all_streams_of_a_client_count_together() -> None:
    subject = limits(blocks=10)
    with subject.stream("a") as one, subject.stream("a") as two, subject.stream("b") as other:
        read(one, credit(4), credit(3))
        with pytest.raises(ResourceExhaustedError, match=r"4 beside 7 .*service\.per_client\.blocks is 10"):
            read(two, credit(4))
        read(other, credit(10))
        skipping = frame(3)
        skipping.skipped.add()
        skipping.skipped.add()
        one.sent(skipping)  # a window that was left out has used up its credit, too
        read(two, credit(8))
        with pytest.raises(InvalidArgumentError, match=r"credit\.blocks: 11 at once"):
            read(one, credit(11))
    assert subject.idle


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["credit", "sent", "end"]), st.integers(1, 12))))
def test_no_client_ever_holds_more_and_nothing_is_kept_of_those_who_left(steps: list[tuple[str, str, int]]) -> None:
    subject = limits(streams=2, blocks=10)
    streams: dict[str, Any] = {}
    granted = dict.fromkeys("abc", 0)
    with ExitStack() as stack:
        for client, what, blocks in steps:
            if client not in streams:
                streams[client] = stack.enter_context(subject.stream(client))
            if what == "credit":
                fits = granted[client] + blocks <= 10
                try:
                    read(streams[client], credit(blocks))
                    granted[client] += blocks
                    assert fits
                except (ResourceExhaustedError, InvalidArgumentError):
                    assert not fits
            elif what == "sent":
                num_sent = min(blocks, granted[client])
                streams[client].sent(frame(num_sent))
                granted[client] -= num_sent
    assert subject.idle
