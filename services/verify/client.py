"""Client of the verifier, used by training and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import grpc

from fusion.v1 import block_pb2, verify_pb2, verify_pb2_grpc
from fusion_core.verify.verdict import Verdict
from services.base.errors import UnavailableError
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.ordered_stream import OrderedStream, StreamKind
from services.rpc.status import error_of_call
from services.verify.messages import decode_output
from services.verify.sandbox.output_run import ProgramOutput

Submission: TypeAlias = tuple[str, bytes]
"""An answer, and its spec as JSON."""


class VerifierClient:
    """A client of one verifier, on the running event loop."""

    def __init__(self, address: str, application: str = "verify", *, timeout_seconds: float = 600.0) -> None:
        self.address, self.application = address, application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = verify_pb2_grpc.VerifierServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> verify_pb2.GetVerifierInfoResponse:
        """Return the verifier's description; raises ServiceError: UnavailableError when it cannot be reached."""
        request = verify_pb2.GetVerifierInfoRequest()
        response: verify_pb2.GetVerifierInfoResponse = await self._call(
            self._stub.GetVerifierInfo, request, timeout_seconds
        )
        return response

    async def verify(self, submissions: Sequence[Submission]) -> list[Verdict]:
        """Return the verdicts on a few answers, in order; raises ServiceError."""
        request = verify_pb2.VerifyRequest(submissions=map(_encoded, submissions))
        response = await self._call(self._stub.Verify, request, self._timeout_seconds)
        if len(response.verdicts) != len(submissions):
            raise UnavailableError(
                f"verifier {self.application} sent {len(response.verdicts)} verdicts on {len(submissions)} answers"
            )
        return [_decoded(message) for message in response.verdicts]

    async def run(self, program: str, max_output_bytes: int) -> ProgramOutput:
        """Return the output of a program; raises ServiceError."""
        request = verify_pb2.RunProgramRequest(
            program=program.encode(errors="replace"), max_output_bytes=max_output_bytes
        )
        return decode_output(await self._call(self._stub.RunProgram, request, self._timeout_seconds))

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        try:
            metadata = (*call_metadata(self.application), *timeout_metadata(timeout_seconds))
            return await method(request, metadata=metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"verifier {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class VerdictStream(OrderedStream[Submission, Verdict]):
    """A stream of answers to a verifier, and of verdicts back.

    Args:
        in_flight: answers under way at once, at most 256; others wait here.
        timeout_seconds: a verifier that owes verdicts and sends none for so long breaks the stream.
    """

    def __init__(
        self,
        address: str,
        application: str = "verify",
        *,
        in_flight: int = 64,
        timeout_seconds: float | None = None,
    ) -> None:
        super().__init__(address, application, _Verdicts(), timeout_seconds=timeout_seconds)
        self._gate = asyncio.Semaphore(in_flight)

    async def verdict(self, submission: Submission) -> Verdict:
        """Return the verdict on an answer; raises ServiceError when the stream broke before it."""
        async with self._gate:
            return await self.ask(submission)


class _Verdicts(StreamKind[Submission, Verdict]):
    stub, method, service = verify_pb2_grpc.VerifierServiceStub, "StreamVerdicts", "verifier"

    def opening(self) -> verify_pb2.StreamVerdictsRequest:
        return verify_pb2.StreamVerdictsRequest(open=verify_pb2.StreamVerdictsOpen())

    def requests(self, items: Sequence[Submission]) -> Iterator[verify_pb2.StreamVerdictsRequest]:
        submissions = verify_pb2.Submissions(submissions=map(_encoded, items))
        yield verify_pb2.StreamVerdictsRequest(submissions=submissions)
        yield verify_pb2.StreamVerdictsRequest(credit=block_pb2.Credit(blocks=len(items)))

    def messages(self, frame: verify_pb2.StreamVerdictsResponse) -> Sequence[verify_pb2.Verdict]:
        return frame.verdicts

    def fits(self, message: verify_pb2.Verdict, item: Submission, number: int) -> bool:
        return True

    def decode(self, message: verify_pb2.Verdict, number: int) -> Verdict:
        return _decoded(message)


def _encoded(submission: Submission) -> verify_pb2.Submission:
    text, spec = submission
    return verify_pb2.Submission(text=text.encode(errors="replace"), spec=spec)


def _decoded(message: verify_pb2.Verdict) -> Verdict:
    return Verdict(message.right, message.score, message.reason)
