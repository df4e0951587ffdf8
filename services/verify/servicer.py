"""The verifier service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from fusion.v1 import verify_pb2
from fusion_core.verify.specs import Spec, parse_spec
from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError
from services.rpc.auth import accepted_tokens
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining, replica_name
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.pipeline import RequestPipeline, opening_of
from services.verify.config import VerifyConfig
from services.verify.messages import encode_output
from services.verify.metrics import VerifyMetrics
from services.verify.verifier import Verifier
from services.wire.protocol import PROTOCOL_VERSION

logger = logging.getLogger("ray.serve")

Task: TypeAlias = tuple[Spec, str]
"""A spec, and the answer that is held against it."""
_MOST_REASON_CHARACTERS = 500
MAX_OUTPUT_BYTES = 2**16
"""Most bytes of a program's output."""
MAX_WAITING = 256
"""Answers that a stream may have waiting for credits."""


class VerifierServicer:
    """Methods of fusion.v1.VerifierService and grpc.health.v1.Health."""

    async def __init__(self, config: VerifyConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        accepted_tokens()  # refuses a malformed token now, not at every call
        self._config = config
        self.client_limits = ClientLimits(config.per_client, "verify.per_client")
        self._verifier = await asyncio.to_thread(Verifier, config)
        self._metrics = VerifyMetrics()
        self._draining = Draining()
        self._replica = replica_name()
        if problem := self._verifier.sandbox.problem:
            logger.warning("programs are refused, all else is judged: %s", problem)

    @unary
    async def GetVerifierInfo(self, request: verify_pb2.GetVerifierInfoRequest) -> verify_pb2.GetVerifierInfoResponse:
        config = self._config
        return verify_pb2.GetVerifierInfoResponse(
            kinds=self._verifier.kinds,
            sandbox_problem=self._verifier.sandbox.problem,
            max_text_bytes=config.max_text_bytes,
            max_spec_bytes=config.max_spec_bytes,
            max_submissions=config.max_submissions,
            program_seconds=config.program_seconds,
            program_memory_bytes=config.program_memory_bytes,
            programs_at_once=config.programs_at_once,
            protocol_version=PROTOCOL_VERSION,
            max_output_bytes=0 if self._verifier.sandbox.problem else MAX_OUTPUT_BYTES,
        )

    @unary
    async def Verify(self, request: verify_pb2.VerifyRequest) -> verify_pb2.VerifyResponse:
        most = self._config.max_submissions
        if not 1 <= len(request.submissions) <= most:
            raise InvalidArgumentError(f"submissions: 1 to {most} are allowed, got {len(request.submissions)}")
        tasks = await asyncio.to_thread(self._tasks, request.submissions, 0)
        return verify_pb2.VerifyResponse(verdicts=await gather_or_cancel(*map(self._verdict, tasks)))

    @bidirectional
    async def StreamVerdicts(
        self, requests: AsyncIterator[verify_pb2.StreamVerdictsRequest]
    ) -> AsyncGenerator[verify_pb2.StreamVerdictsResponse, None]:
        await opening_of(requests)
        pipeline = RequestPipeline(
            requests,
            "submissions",
            self._stream_tasks,
            self._verdict,
            verify_pb2.Verdict.ByteSize,
            max_waiting=MAX_WAITING,
        )

        async with self._draining.holding(pipeline), aclosing(pipeline.answers()) as frames:
            yield verify_pb2.StreamVerdictsResponse(replica=self._replica)
            async for frame in frames:
                yield verify_pb2.StreamVerdictsResponse(verdicts=frame)

    @unary
    async def RunProgram(self, request: verify_pb2.RunProgramRequest) -> verify_pb2.RunProgramResponse:
        most = self._config.max_text_bytes
        if len(request.program) > most:
            raise InvalidArgumentError(f"program: {len(request.program)} bytes, at most {most} are allowed")
        max_output_bytes = request.max_output_bytes if request.HasField("max_output_bytes") else MAX_OUTPUT_BYTES
        if not 1 <= max_output_bytes <= MAX_OUTPUT_BYTES:
            raise InvalidArgumentError(
                f"max_output_bytes: 1 to {MAX_OUTPUT_BYTES} are allowed, got {request.max_output_bytes}"
            )
        start = time.monotonic()
        found = await self._verifier.run(request.program.decode(errors="replace"), max_output_bytes)
        self._metrics.seconds.inc(time.monotonic() - start, {"kind": "run"})
        self._metrics.programs_running.set(self._verifier.programs_running)
        return encode_output(found)

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.VerifierService", _no_problem)

    def record_failure(self, code: grpc.StatusCode) -> None:
        """Count a call that ended with an error; services/rpc/methods.py calls this for every one."""
        self._metrics.errors.inc(1, {"code": code.name})

    async def close(self) -> None:
        """End the watch for draining and the threads of the programs."""
        await self._draining.close()
        await asyncio.to_thread(self._verifier.close)

    def _stream_tasks(self, message: verify_pb2.Submissions, first: int) -> list[Task]:
        return self._tasks(message.submissions, first)

    def _tasks(self, submissions: Sequence[verify_pb2.Submission], first: int) -> list[Task]:
        """Return the tasks of submissions numbered from `first`; raises InvalidArgumentError naming the field."""
        tasks: list[Task] = []
        config = self._config
        for number, submission in enumerate(submissions, first):
            where = f"submissions[{number}]"
            for field, given, most in (
                ("text", submission.text, config.max_text_bytes),
                ("spec", submission.spec, config.max_spec_bytes),
            ):
                if len(given) > most:
                    raise InvalidArgumentError(f"{where}.{field}: {len(given)} bytes, at most {most} are allowed")
            try:
                spec = parse_spec(submission.spec)
            except ValueError as error:
                raise InvalidArgumentError(f"{where}.spec: {error}") from error
            tasks.append((spec, submission.text.decode(errors="replace")))
        return tasks

    async def _verdict(self, task: Task) -> verify_pb2.Verdict:
        spec, text = task
        start = time.monotonic()
        verdict = await self._verifier.judge(spec, text)
        self._metrics.seconds.inc(time.monotonic() - start, {"kind": spec.kind})
        self._metrics.verdicts.inc(1, {"kind": spec.kind, "verdict": "right" if verdict.right else "wrong"})
        self._metrics.programs_running.set(self._verifier.programs_running)
        reason = verdict.reason[:_MOST_REASON_CHARACTERS].encode(errors="replace").decode()
        return verify_pb2.Verdict(right=verdict.right, score=verdict.score, reason=reason)


async def _no_problem() -> None:
    """Say that the service can do its work: without a sandbox it refuses programs, and judges all else."""
