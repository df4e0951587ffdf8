"""Client of a source, used by the fusion service and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from fusion.v1 import answer_pb2, block_pb2, source_pb2, source_pb2_grpc
from fusion_core.blocks import Block
from services.base.errors import InvalidArgumentError, UnavailableError
from services.rpc.auth import call_metadata
from services.rpc.channel import open_aio_channel
from services.rpc.deadline import timeout_metadata
from services.rpc.ordered_stream import OrderedStream, StreamKind
from services.rpc.status import error_of_call
from services.wire.answer import Answer, AnswerPrompt, Sampling, decode_answer, encode_prompt, encode_sampling
from services.wire.block import decode_block
from services.wire.passage import Passage, contexts_of

_DTYPE = block_pb2.LOGPROB_DTYPE_FLOAT16
"""Calls and streams use the same dtype, so a retried window is stored exactly like a streamed one."""


def _decode(message: block_pb2.TokenBlock, source: str) -> Block:
    """Decode a block; raises UnavailableError for a broken one, which is the source's fault and not its caller's."""
    try:
        return decode_block(message)
    except InvalidArgumentError as error:
        raise UnavailableError(f"source {source} sent a broken block: {error}") from error


def _decode_answers(message: answer_pb2.PromptAnswers, sampling: Sampling, number: int, source: str) -> list[Answer]:
    """Decode the answers to a prompt; raises UnavailableError for those that are not what was asked for."""
    try:
        answers = [decode_answer(answer) for answer in message.answers]
    except InvalidArgumentError as error:
        raise UnavailableError(f"source {source} sent a broken answer: {error}") from error
    if [(answer.prompt, answer.number) for answer in answers] != [(number, n) for n in sampling.numbers]:
        raise UnavailableError(f"source {source} sent other answers than those to prompt {number}")
    if sampling.logprobs and any(answer.logprobs_T is None for answer in answers):
        raise UnavailableError(f"source {source} left out the log-probabilities")
    return answers


class SourceClient:
    """A client of one source, on the running event loop; a stream has a channel of its own."""

    def __init__(self, address: str, application: str, *, timeout_seconds: float = 600.0) -> None:
        self.address = address
        self.application = application
        self._timeout_seconds = timeout_seconds
        self._channel = open_aio_channel(address)
        self._stub = source_pb2_grpc.SourceServiceStub(self._channel)

    async def info(self, timeout_seconds: float = 10.0) -> source_pb2.GetSourceInfoResponse:
        """Return the source's description; raises ServiceError: UnavailableError when it cannot be reached."""
        request = source_pb2.GetSourceInfoRequest()
        response: source_pb2.GetSourceInfoResponse = await self._call(
            self._stub.GetSourceInfo, request, timeout_seconds
        )
        return response

    async def score(self, passages: Sequence[Passage], *, top_k: int, expected_vocabulary: str = "") -> list[Block]:
        """Return the blocks of a few passages, in order; raises ServiceError."""
        request = source_pb2.ScoreRequest(
            texts=[passage.text for passage in passages],
            contexts=contexts_of(passages),
            top_k=top_k,
            expected_vocabulary=expected_vocabulary,
            dtype=_DTYPE,
        )
        response = await self._call(self._stub.Score, request, self._timeout_seconds)
        return [_decode(message, self.application) for message in response.blocks]

    async def generate(
        self, prompts: Sequence[AnswerPrompt], sampling: Sampling, *, expected_vocabulary: str = ""
    ) -> list[list[Answer]]:
        """Return the answers to a few prompts, in order; raises ServiceError."""
        request = answer_pb2.GenerateRequest(
            prompts=map(encode_prompt, prompts),
            sampling=encode_sampling(sampling),
            expected_vocabulary=expected_vocabulary,
        )
        response = await self._call(self._stub.Generate, request, self._timeout_seconds)
        if len(response.answers) != len(prompts):
            raise UnavailableError(
                f"source {self.application} answered {len(response.answers)} of {len(prompts)} prompts"
            )
        numbered = enumerate(response.answers)
        return [_decode_answers(message, sampling, number, self.application) for number, message in numbered]

    async def _call(self, method: Any, request: Any, timeout_seconds: float) -> Any:
        try:
            metadata = (*call_metadata(self.application), *timeout_metadata(timeout_seconds))
            return await method(request, metadata=metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, f"source {self.application} at {self.address}") from error

    async def close(self) -> None:
        await self._channel.close()


class ScoreStream(OrderedStream[Passage, Block]):
    """A stream of texts to a source, and of blocks back."""

    def __init__(
        self,
        address: str,
        application: str,
        *,
        top_k: int,
        expected_vocabulary: str = "",
        timeout_seconds: float | None = None,
    ) -> None:
        opening = source_pb2.StreamScoresOpen(top_k=top_k, expected_vocabulary=expected_vocabulary, dtype=_DTYPE)
        super().__init__(address, application, _Scores(application, opening), timeout_seconds=timeout_seconds)

    async def score(self, passage: Passage) -> Block:
        """Return the block of a passage; raises ServiceError when the stream broke before the answer."""
        return await self.ask(passage)


class AnswerStream(OrderedStream[AnswerPrompt, list[Answer]]):
    """A stream of prompts to a source, and of their answers back."""

    def __init__(
        self,
        address: str,
        application: str,
        sampling: Sampling,
        *,
        expected_vocabulary: str = "",
        timeout_seconds: float | None = None,
    ) -> None:
        kind = _Answers(application, sampling, expected_vocabulary)
        super().__init__(address, application, kind, timeout_seconds=timeout_seconds)

    async def answers(self, prompt: AnswerPrompt) -> list[Answer]:
        """Return all answers to a prompt; raises ServiceError when the stream broke before them."""
        return await self.ask(prompt)


class _Scores(StreamKind[Passage, Block]):
    stub, method, service = source_pb2_grpc.SourceServiceStub, "StreamScores", "source"

    def __init__(self, application: str, opening: source_pb2.StreamScoresOpen) -> None:
        self._application, self._opening = application, opening

    def opening(self) -> source_pb2.StreamScoresRequest:
        return source_pb2.StreamScoresRequest(open=self._opening)

    def requests(self, items: Sequence[Passage]) -> Iterator[source_pb2.StreamScoresRequest]:
        texts = source_pb2.ScoreTexts(texts=[p.text for p in items], contexts=contexts_of(items))
        yield source_pb2.StreamScoresRequest(texts=texts)
        yield source_pb2.StreamScoresRequest(credit=block_pb2.Credit(blocks=len(items)))

    def messages(self, frame: source_pb2.StreamScoresResponse) -> Sequence[block_pb2.TokenBlock]:
        return frame.blocks

    def fits(self, message: block_pb2.TokenBlock, item: Passage, number: int) -> bool:
        return message.text == item.text

    def decode(self, message: block_pb2.TokenBlock, number: int) -> Block:
        return _decode(message, self._application)


class _Answers(StreamKind[AnswerPrompt, list[Answer]]):
    stub, method, service = source_pb2_grpc.SourceServiceStub, "StreamAnswers", "source"

    def __init__(self, application: str, sampling: Sampling, expected_vocabulary: str) -> None:
        self._application, self._sampling = application, sampling
        self._expected_vocabulary = expected_vocabulary

    def opening(self) -> answer_pb2.StreamAnswersRequest:
        opening = answer_pb2.StreamAnswersOpen(
            sampling=encode_sampling(self._sampling), expected_vocabulary=self._expected_vocabulary
        )
        return answer_pb2.StreamAnswersRequest(open=opening)

    def requests(self, items: Sequence[AnswerPrompt]) -> Iterator[answer_pb2.StreamAnswersRequest]:
        prompts = answer_pb2.AnswerPrompts(prompts=map(encode_prompt, items))
        yield answer_pb2.StreamAnswersRequest(prompts=prompts)
        yield answer_pb2.StreamAnswersRequest(credit=block_pb2.Credit(blocks=len(items)))

    def messages(self, frame: answer_pb2.StreamAnswersResponse) -> Sequence[answer_pb2.PromptAnswers]:
        return frame.answers

    def fits(self, message: answer_pb2.PromptAnswers, item: AnswerPrompt, number: int) -> bool:
        return bool(message.answers) and message.answers[0].prompt == number

    def decode(self, message: answer_pb2.PromptAnswers, number: int) -> list[Answer]:
        return _decode_answers(message, self._sampling, number, self._application)
