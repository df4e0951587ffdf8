"""The methods of the source service that answer prompts: `Generate` and `StreamAnswers`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from fusion.v1 import answer_pb2
from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError, UnavailableError
from services.rpc.draining import Draining
from services.rpc.methods import bidirectional, unary
from services.rpc.pipeline import RequestPipeline, opening_of
from services.source.answers.generator import EncodedPrompt, Generator
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.answer import Sampling, encode_answer, prompts_of, sampling_of

MAX_PROMPTS = 256
"""Prompts in one Generate call, and prompts that a stream may have waiting for credits."""


class AnswersServicer:
    """The part of fusion.v1.SourceService that generates; whoever inherits it sets the attributes."""

    _config: SourceConfig
    _scorer: Scorer
    _generator: Generator
    _draining: Draining
    _replica: str

    @unary
    async def Generate(self, request: answer_pb2.GenerateRequest) -> answer_pb2.GenerateResponse:
        if not 1 <= len(request.prompts) <= MAX_PROMPTS:
            raise InvalidArgumentError(f"prompts: 1 to {MAX_PROMPTS} are allowed, got {len(request.prompts)}")
        sampling = self._checked_sampling(request)
        self._generator.check_size(len(request.prompts), sampling)
        prompts = await asyncio.to_thread(self._encoded, request.prompts, sampling, 0)

        async def answer(prompt: EncodedPrompt) -> answer_pb2.PromptAnswers:
            try:
                return await self._answered(prompt, sampling)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"prompts[{prompt.number}]: {error}") from error

        return answer_pb2.GenerateResponse(answers=await gather_or_cancel(*map(answer, prompts)))

    @bidirectional
    async def StreamAnswers(
        self, requests: AsyncIterator[answer_pb2.StreamAnswersRequest]
    ) -> AsyncGenerator[answer_pb2.StreamAnswersResponse, None]:
        opened = await opening_of(requests)
        sampling = self._checked_sampling(opened)
        self._generator.check_size(1, sampling)

        def prompts_of(message: answer_pb2.AnswerPrompts, first: int) -> list[EncodedPrompt]:
            return self._encoded(message.prompts, sampling, first)

        async def answer(prompt: EncodedPrompt) -> answer_pb2.PromptAnswers:
            return await self._answered(prompt, sampling)

        size = answer_pb2.PromptAnswers.ByteSize
        pipeline = RequestPipeline(requests, "prompts", prompts_of, answer, size, max_waiting=MAX_PROMPTS)

        async with self._draining.holding(pipeline), aclosing(pipeline.answers()) as frames:
            yield answer_pb2.StreamAnswersResponse(replica=self._replica)
            async for frame in frames:
                yield answer_pb2.StreamAnswersResponse(answers=frame)

    def _checked_sampling(self, request: answer_pb2.GenerateRequest | answer_pb2.StreamAnswersOpen) -> Sampling:
        """Return the settings of a request; raises ServiceError naming the field that cannot be honoured."""
        self._scorer.check_vocabulary(request.expected_vocabulary)
        sampling = sampling_of(request.sampling)
        if not request.sampling.HasField("max_new_tokens"):
            fewer = min(sampling.max_new_tokens, self._generator.max_new_tokens)
            sampling = sampling.model_copy(update={"max_new_tokens": fewer})
        self._generator.check(sampling)
        if self._scorer.problem is not None:
            raise UnavailableError(self._scorer.problem)
        return sampling

    def _encoded(
        self, messages: Sequence[answer_pb2.AnswerPrompt], sampling: Sampling, first: int
    ) -> list[EncodedPrompt]:
        prompts = prompts_of(messages, max_prompt_bytes=self._config.max_text_bytes, first=first)
        return self._generator.encode(prompts, sampling, first)

    async def _answered(self, prompt: EncodedPrompt, sampling: Sampling) -> answer_pb2.PromptAnswers:
        message = answer_pb2.PromptAnswers(
            answers=[encode_answer(answer) for answer in await self._generator.answers(prompt, sampling)]
        )
        self._scorer.metrics.wire_bytes.inc(message.ByteSize())
        return message
