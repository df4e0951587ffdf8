"""The methods of the source service that answer prompts: `Generate` and `StreamAnswers`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from fusion.v1 import answer_pb2
from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from services.rpc.draining import Draining
from services.rpc.methods import bidirectional, unary
from services.rpc.pipeline import Pipeline, until_none
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
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "open":
            raise InvalidArgumentError("message: a stream starts with `open`")
        sampling = self._checked_sampling(first.open)
        self._generator.check_size(1, sampling)
        waiting: asyncio.Queue[EncodedPrompt | None] = asyncio.Queue()  # `read` bounds it

        async def answer(prompt: EncodedPrompt) -> answer_pb2.PromptAnswers:
            return await self._answered(prompt, sampling)

        pipeline = Pipeline(until_none(waiting), answer, answer_pb2.PromptAnswers.ByteSize)

        async def read() -> None:
            num_read = 0
            async for message in requests:
                match message.WhichOneof("message"):
                    case "credit":
                        pipeline.credits.grant(message.credit.blocks)
                    case "prompts":
                        prompts = message.prompts.prompts
                        if waiting.qsize() + len(prompts) > MAX_PROMPTS:
                            raise ResourceExhaustedError(f"prompts: at most {MAX_PROMPTS} may wait for credits")
                        for prompt in await asyncio.to_thread(self._encoded, prompts, sampling, num_read):
                            waiting.put_nowait(prompt)
                        num_read += len(prompts)
                    case other:
                        raise InvalidArgumentError(f"message: expected prompts or credit, got {other or 'nothing'}")
            waiting.put_nowait(None)

        async with self._draining.holding(pipeline), aclosing(pipeline.frames(read)) as frames:
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
