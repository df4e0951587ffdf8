"""The verifier over gRPC: calls, streams with credits, limits, deadlines, tokens, health."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest

from fusion.v1 import verify_pb2, verify_pb2_grpc
from fusion_core.verify.specs import parse_spec
from services.base.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from services.rpc.health_check import health_of
from services.verify.client import VerdictStream, VerifierClient
from services.verify.config import VerifyConfig
from tests.fakes.services.plain_verifier import plain_verifier
from tests.verify.sandbox.hacks import TESTS
from tests.verify.sandbox.test_hacks import HONEST, sandbox_of


def spec(**values: Any) -> bytes:
    return json.dumps(values).encode()


FIVE = spec(kind="answer", expected=5)
SHORT = spec(kind="constraints", constraints=[{"name": "words", "at_most": 3}, {"name": "no_commas"}])
OBJECT = spec(kind="json_schema", schema={"type": "object"})
ADD = spec(kind="program", functions=["add"], tests=TESTS)
PURE = [("#### 5", FIVE), ("#### 6", FIVE), ("a, b", SHORT), ("", SHORT), ("{}", OBJECT), ("[]", OBJECT)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A verifier without a sandbox."""
    config = VerifyConfig(bwrap="/nowhere/bwrap", max_submissions=8, max_text_bytes=1000, max_spec_bytes=500)
    with plain_verifier(config) as found:
        yield found


@pytest.fixture(scope="module")
def with_sandbox() -> Iterator[str]:
    bwrap = sandbox_of(seconds=60)._bubblewrap
    with plain_verifier(VerifyConfig(bwrap=bwrap, program_seconds=60)) as found:
        yield found


def asked(address: str, ask: Callable[[VerifierClient], Any], **settings: Any) -> Any:
    async def main() -> Any:
        client = VerifierClient(address, **settings)
        try:
            return await ask(client)
        finally:
            await client.close()

    return asyncio.run(main())


async def streamed(address: str, submissions: list[tuple[str, bytes]]) -> list[Any]:
    stream = VerdictStream(address, timeout_seconds=120)
    try:
        return await asyncio.gather(*map(stream.verdict, submissions))
    finally:
        await stream.close()


def test_calls_and_streams_give_the_verdicts_of_the_library_in_order(address: str) -> None:
    wanted = [parse_spec(data).judge(text) for text, data in PURE]  # type: ignore[union-attr]
    assert [verdict.right for verdict in wanted] == [True, False, False, False, True, False]
    assert asked(address, lambda client: client.verify(PURE)) == wanted
    assert asyncio.run(streamed(address, PURE * 100)) == wanted * 100


def test_programs_are_judged_beside_everything_else(with_sandbox: str) -> None:
    submissions = [("def add(a, b): return a - b", ADD), *PURE, (HONEST, ADD), ("import os\nos._exit(0)", ADD)]
    wanted = [False, True, False, False, False, True, False, True, False]
    verdicts = asked(with_sandbox, lambda client: client.verify(submissions))
    assert [verdict.right for verdict in verdicts] == wanted
    assert [verdict.right for verdict in asyncio.run(streamed(with_sandbox, submissions))] == wanted
    info = asked(with_sandbox, lambda client: client.info())
    assert (list(info.kinds), info.sandbox_problem) == (["answer", "constraints", "json_schema", "program"], "")
    assert (info.program_seconds, info.program_memory_bytes, info.max_submissions) == (60, 2**29, 256)


def test_without_a_sandbox_programs_alone_are_refused(address: str) -> None:
    info = asked(address, lambda client: client.info())
    assert list(info.kinds) == ["answer", "constraints", "json_schema"]
    assert "apt-get install bubblewrap" in info.sandbox_problem
    with pytest.raises(FailedPreconditionError, match="kind program: programs need bubblewrap"):
        asked(address, lambda client: client.verify([(HONEST, ADD)]))
    assert health_of(address, "verify") == "SERVING"


@pytest.mark.parametrize(
    ("submissions", "message"),
    [
        ([], "submissions: 1 to 8 are allowed, got 0"),
        ([("a", FIVE)] * 9, "submissions: 1 to 8 are allowed, got 9"),
        ([("a", FIVE), ("a" * 1001, FIVE)], r"submissions\[1\]\.text: 1001 bytes, at most 1000 are allowed"),
        ([("a", FIVE + b" " * 500)], r"submissions\[0\]\.spec: \d+ bytes, at most 500 are allowed"),
        ([("a", b"{")], r"submissions\[0\]\.spec: not JSON"),
        ([("a", spec(kind="x"))], r"submissions\[0\]\.spec: kind: 'x' is none of answer"),
    ],
)
def test_a_wrong_field_is_named(address: str, submissions: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        asked(address, lambda client: client.verify(submissions))


def running_programs() -> list[Any]:
    return [process for process in psutil.Process().children(recursive=True) if "bwrap" in process.name()]


def test_a_caller_that_waits_no_longer_ends_its_program(with_sandbox: str) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        asked(with_sandbox, lambda client: client.verify([("while True:\n    pass", ADD)] * 2), timeout_seconds=3)
    assert asked(with_sandbox, lambda client: client.verify([(HONEST, ADD)]))[0].right  # the places are free again
    assert time.monotonic() - start < 50  # a program may take 60 s
    assert running_programs() == []


def test_a_program_is_run_for_its_output(with_sandbox: str, address: str) -> None:
    found = asked(with_sandbox, lambda client: client.run("print('é')\n6 * 7", 100))
    assert (found.end, found.output.decode()) == ("finished", "é\n42\n")
    assert asked(with_sandbox, lambda client: client.run("print('x' * 99)", 5)).output == b"xxxxx"
    assert asked(with_sandbox, lambda client: client.info()).max_output_bytes == 65536
    for bound in (0, 65537):
        with pytest.raises(InvalidArgumentError, match=f"max_output_bytes: 1 to 65536 are allowed, got {bound}"):
            asked(with_sandbox, lambda client, most=bound: client.run("1", most))
    assert asked(address, lambda client: client.info()).max_output_bytes == 0
    with pytest.raises(FailedPreconditionError, match="program: programs need bubblewrap"):
        asked(address, lambda client: client.run("1", 5))
    with pytest.raises(InvalidArgumentError, match="program: 1001 bytes, at most 1000 are allowed"):
        asked(address, lambda client: client.run("1" * 1001, 5))
    with pytest.raises(DeadlineExceededError):
        asked(with_sandbox, lambda client: client.run("while True:\n    pass", 5), timeout_seconds=2)
    assert psutil.wait_procs(running_programs(), timeout=30)[1] == []  # a program may take 60 s


async def _frames(address: str, *messages: dict[str, Any]) -> AsyncIterator[verify_pb2.StreamVerdictsResponse]:
    async def requests() -> AsyncIterator[verify_pb2.StreamVerdictsRequest]:
        for message in messages:
            yield verify_pb2.StreamVerdictsRequest(**message)

    async with grpc.aio.insecure_channel(address) as channel:
        async for frame in verify_pb2_grpc.VerifierServiceStub(channel).StreamVerdicts(requests()):
            yield frame


def test_verdicts_come_only_for_credits(address: str) -> None:
    async def main() -> None:
        submissions = {"submissions": {"submissions": [{"text": b"5", "spec": FIVE}] * 5}}
        found, replica = 0, ""
        async for frame in _frames(address, {"open": {}}, submissions, {"credit": {"blocks": 3}}):
            replica = replica or frame.replica
            found += len(frame.verdicts)
        assert (found, bool(replica)) == (3, True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        ([{"credit": {"blocks": 1}}], "INVALID_ARGUMENT", "a stream starts with `open`"),
        ([{"open": {}}, {"open": {}}], "INVALID_ARGUMENT", "expected submissions or credit, got open"),
        ([{"open": {}}, {"credit": {"blocks": 10**6}}], "INVALID_ARGUMENT", "verify.per_client.blocks is 1024"),
        (
            [{"open": {}}, *[{"submissions": {"submissions": [{"text": b"5", "spec": FIVE}] * 200}}] * 2],
            "RESOURCE_EXHAUSTED",
            "at most 256 may wait for credits",
        ),
        (
            [
                {"open": {}},
                {"submissions": {"submissions": [{"text": b"5", "spec": FIVE}] * 3}},
                {"submissions": {"submissions": [{"text": b"5", "spec": b""}]}},
            ],
            "INVALID_ARGUMENT",
            "submissions[3].spec",
        ),
    ],
)
def test_what_is_wrong_on_a_stream_ends_it(address: str, messages: list[Any], code: str, text: str) -> None:
    async def main() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in _frames(address, *messages):
                pass
        assert caught.value.code().name == code
        assert text in str(caught.value.details())

    asyncio.run(main())


def test_a_token_is_asked_for_and_a_large_request_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"request_bytes": 1000}
    with plain_verifier(VerifyConfig(bwrap="/nowhere/bwrap", per_client=limits)) as address:  # type: ignore[arg-type]
        with pytest.raises(ResourceExhaustedError, match=r"verify\.per_client\.request_bytes is 1000"):
            asked(address, lambda client: client.verify([("a" * 1000, FIVE)]))
        monkeypatch.setenv("FUSION_TOKEN", "right")
        assert asked(address, lambda client: client.verify([("5", FIVE)]))[0].right
        with pytest.raises(grpc.RpcError) as caught, grpc.insecure_channel(address) as channel:
            verify_pb2_grpc.VerifierServiceStub(channel).Verify(verify_pb2.VerifyRequest())
        assert caught.value.code() == UnauthenticatedError.code
        assert health_of(address, "verify") == "SERVING"
