"""The source service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from fusion.v1 import block_pb2, source_pb2
from services.base.concurrency import gather_or_cancel
from services.base.errors import (
    InvalidArgumentError,
    UnavailableError,
)
from services.models.catalogue import resolve_model
from services.models.prompt import Prompt
from services.models.revision import weights_revision
from services.rpc.auth import accepted_tokens
from services.rpc.client_limits import ClientLimits
from services.rpc.draining import Draining, replica_name
from services.rpc.health import health_response
from services.rpc.methods import bidirectional, public_unary, unary
from services.rpc.pipeline import RequestPipeline, opening_of
from services.source.answers.generator import Generator
from services.source.answers.servicer import AnswersServicer
from services.source.canary import CanaryRecord
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.block import check_dtype, encode_block, most_block_bytes
from services.wire.passage import passages_of
from services.wire.protocol import MAX_BLOCK_BYTES

logger = logging.getLogger("ray.serve")

_LOOK_SECONDS = 0.1
MAX_TEXTS = 256
"""Most texts in one Score call, and most texts that wait for credits on one stream."""


class SourceServicer(AnswersServicer):
    """Methods of fusion.v1.SourceService and grpc.health.v1.Health."""

    async def __init__(self, config: SourceConfig) -> None:  # type: ignore[misc]  # Serve awaits constructors
        accepted_tokens()  # refuses a malformed token now, not at every call
        self._config = config
        self.client_limits = ClientLimits(config.per_client, f"sources.{config.name}.per_client")
        folder = resolve_model(config.model)
        hashing = asyncio.create_task(asyncio.to_thread(weights_revision, folder)) if config.weights_here else None
        self._scorer = await Scorer.load(config, folder)
        self._generator = await Generator.load(self._scorer, folder)
        self._revision = await hashing if hashing is not None else self._scorer.engine.revision or ""
        engine = self._scorer.engine
        logger.info("source %s serves %s on %s", config.name, config.model, engine.name_and_version)
        identity = (self._revision, self._scorer.vocabulary.fingerprint, self._scorer.bos_token)
        self._scorer.record = CanaryRecord((*identity, engine.name_and_version, engine.dtype))
        try:
            await self._scorer.start_canary()  # before anyone can ask
        except BaseException:
            engine.close()
            raise
        if self._scorer.problem is not None:
            logger.error("%s", self._scorer.problem)
        self._draining = Draining(self._leave)
        self._replica = replica_name()
        self._canary = asyncio.create_task(_repeat(config.canary.interval_seconds, self._scorer))

    @unary
    async def GetSourceInfo(self, request: source_pb2.GetSourceInfoRequest) -> source_pb2.GetSourceInfoResponse:
        config, vocabulary = self._config, self._scorer.vocabulary
        return source_pb2.GetSourceInfoResponse(
            name=config.name,
            model=config.model,
            engine=self._scorer.engine.name_and_version,
            dtype=self._scorer.engine.dtype,
            vocabulary=vocabulary.fingerprint,
            vocabulary_size=vocabulary.size,
            max_top_k=config.largest_top_k,
            max_tokens=config.max_tokens,
            max_text_bytes=config.max_text_bytes,
            bos_token=self._scorer.bos_token,
            revision=self._revision,
            eos_token=self._scorer.eos_token,
            chat_template=self._scorer.chat.template.hash if self._scorer.chat else "",
            logprobs_path=self._scorer.engine.path,
            determinism=self._scorer.determinism,
            max_tokens_in_flight=self._scorer.admission.max_tokens,
            problem=self._scorer.problem or "",
            answer_template=self._generator.chat.template_hash,
            max_new_tokens=self._generator.max_new_tokens,
            max_answers=config.generation.max_answers,
            tool_format=self._generator.chat.tool_format or "",
        )

    @unary
    async def Score(self, request: source_pb2.ScoreRequest) -> source_pb2.ScoreResponse:
        if not 1 <= len(request.texts) <= MAX_TEXTS:
            raise InvalidArgumentError(f"texts: 1 to {MAX_TEXTS} texts are allowed, got {len(request.texts)}")
        answer = self._answer(request)
        prompts = await asyncio.to_thread(self._prompts, request)
        self._check_size(prompts, request, "texts")

        async def numbered(index: int, prompt: Prompt) -> block_pb2.TokenBlock:
            try:
                message: block_pb2.TokenBlock = await answer(prompt)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"texts[{index}]: {error}") from error
            return message

        return source_pb2.ScoreResponse(blocks=await gather_or_cancel(*itertools.starmap(numbered, enumerate(prompts))))

    @bidirectional
    async def StreamScores(
        self, requests: AsyncIterator[source_pb2.StreamScoresRequest]
    ) -> AsyncGenerator[source_pb2.StreamScoresResponse, None]:
        opened = await opening_of(requests)

        def prompts_of(message: source_pb2.ScoreTexts, _first: int) -> list[Prompt]:
            prompts = self._prompts(message)
            for index, prompt in enumerate(prompts):
                self._check_size([prompt], opened, f"texts[{index}]")
            return prompts

        size = block_pb2.TokenBlock.ByteSize
        pipeline = RequestPipeline(requests, "texts", prompts_of, self._answer(opened), size, max_waiting=MAX_TEXTS)

        async with self._draining.holding(pipeline), aclosing(pipeline.answers()) as frames:
            yield source_pb2.StreamScoresResponse(replica=self._replica)
            async for frame in frames:
                yield source_pb2.StreamScoresResponse(blocks=frame)

    @public_unary
    async def Check(self, request: Any) -> Any:
        return await health_response(request, "fusion.v1.SourceService", self._problem)

    async def _problem(self) -> str | None:
        try:
            await self._scorer.engine.check_health()
        except Exception as error:
            return f"engine: {error}"
        return self._scorer.problem

    async def check_health(self) -> None:
        """Answer Serve's own probe: a replica whose engine died is replaced.

        A replica whose model is broken stays and says why: the weights on disk may be the reason. So does one whose
        model runs elsewhere.
        """
        self._scorer.report_state()
        if self._scorer.engine.runs_here:
            await self._scorer.engine.check_health()

    def record_failure(self, code: grpc.StatusCode) -> None:
        """Count a call that ended with an error; services/rpc/methods.py calls this for every one."""
        self._scorer.metrics.errors.inc(1, {"code": code.name})

    async def close(self) -> None:
        """Stop the canary and the watch for draining, and end the engine."""
        self._canary.cancel()
        await asyncio.gather(self._canary, return_exceptions=True)
        await self._draining.close()
        self._scorer.close()

    async def _leave(self) -> None:
        """End the engine as soon as no call needs it. Serve has told this replica to stop, and kills it once idle."""
        while not self.client_limits.idle:
            await asyncio.sleep(_LOOK_SECONDS)
        self._scorer.close()

    def _answer(self, request: source_pb2.ScoreRequest | source_pb2.StreamScoresOpen) -> Any:
        """Check a request's settings, and return the coroutine function that answers one text under them."""
        self._scorer.check_vocabulary(request.expected_vocabulary)
        dtype = check_dtype(request.dtype)
        top_k = self._scorer.check_top_k(request.top_k if request.HasField("top_k") else None)

        if self._scorer.problem is not None:
            raise UnavailableError(self._scorer.problem)

        async def answer(prompt: Prompt) -> block_pb2.TokenBlock:
            message = encode_block(await self._scorer.score(prompt, top_k), dtype)
            self._scorer.metrics.tokens_scored.inc(message.num_tokens)
            self._scorer.metrics.wire_bytes.inc(message.ByteSize())
            return message

        return answer

    def _check_size(
        self, prompts: Sequence[Prompt], request: source_pb2.ScoreRequest | source_pb2.StreamScoresOpen, field: str
    ) -> None:
        """Raise InvalidArgumentError, before the engine has worked, when the answer might not fit a message."""
        dtype = check_dtype(request.dtype)
        top_k = self._scorer.check_top_k(request.top_k if request.HasField("top_k") else None)
        num_bytes = sum(most_block_bytes(len(p.text), p.encoding.num_tokens, top_k, dtype) for p in prompts)
        if num_bytes > MAX_BLOCK_BYTES:
            raise InvalidArgumentError(
                f"{field}: with {top_k} candidates a token the answer can take {num_bytes} bytes, and "
                f"{MAX_BLOCK_BYTES} fit a message; ask for fewer texts at once, shorter ones, or a smaller top_k"
            )

    def _prompts(self, request: source_pb2.ScoreRequest | source_pb2.ScoreTexts) -> list[Prompt]:
        limit = self._config.max_text_bytes
        return self._scorer.encode(passages_of(request.texts, request.contexts, max_text_bytes=limit))


async def _repeat(interval_seconds: float | None, scorer: Scorer) -> None:
    while interval_seconds is not None and scorer.problem is None:
        await asyncio.sleep(interval_seconds)
        try:
            await scorer.check_canary()
        except Exception:  # the next round may succeed, and every block is checked anyway
            logger.exception("source %s: the canary could not be scored", scorer.config.name)
        if scorer.problem is not None:
            logger.error("%s", scorer.problem)
