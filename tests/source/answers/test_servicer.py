"""`StreamAnswers`: credits, order, numbers, and the client's stream against a real source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fusion.v1 import answer_pb2, source_pb2_grpc
from services.base.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from services.source.client import AnswerStream, SourceClient
from services.source.config import SourceConfig
from services.wire.answer import AnswerPrompt, Sampling, encode_prompt, encode_sampling, messages_prompt, text_prompt
from tests.fakes.answering import AnsweringSource, answers_in, with_source
from tests.fakes.services.plain_source import PlainSource, plain_source

PROMPTS = [text_prompt(f"The man said {number}") for number in range(12)]
SAMPLING = Sampling(num_answers=2, max_new_tokens=6, seed=4, logprobs=True)


class Requests:
    """The client's side of a stream, by hand."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[answer_pb2.StreamAnswersRequest | None] = asyncio.Queue()

    def put(self, **message: Any) -> None:
        self._queue.put_nowait(answer_pb2.StreamAnswersRequest(**message))

    def prompts(self, prompts: list[AnswerPrompt]) -> None:
        self.put(prompts=answer_pb2.AnswerPrompts(prompts=map(encode_prompt, prompts)))

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[answer_pb2.StreamAnswersRequest]:
        while (message := await self._queue.get()) is not None:
            yield message


def test_no_prompt_is_begun_without_a_credit_and_answers_keep_their_order(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        begun, generate = 0, source.scorer.engine.generate

        def counted(*arguments: Any) -> Any:
            nonlocal begun
            begun += 1
            return generate(*arguments)

        source.scorer.engine.generate = counted  # type: ignore[method-assign]
        requests = Requests()
        frames = source.stream(requests)
        requests.put(open=answer_pb2.StreamAnswersOpen(sampling=encode_sampling(SAMPLING)))
        first = await anext(frames)
        assert (first.replica != "", len(first.answers)) == (True, 0)
        requests.prompts(PROMPTS[:5])
        requests.put(credit={"blocks": 3})
        found = []
        while len(found) < 3:
            found += answers_in(await anext(frames))
        assert begun == 6  # three prompts with two answers each
        requests.prompts(PROMPTS[5:])
        requests.put(credit={"blocks": 9})
        requests.end()
        async for frame in frames:
            found += answers_in(frame)
        assert [[(a.prompt, a.number) for a in group] for group in found] == [[(n, 0), (n, 1)] for n in range(12)]
        begun = 0
        alone = await source.generate(PROMPTS, **SAMPLING.model_dump())
        assert [a.token_ids_T.tolist() for g in found for a in g] == [a.token_ids_T.tolist() for g in alone for a in g]

    with_source(folder, run, engine="synthetic")


def test_what_is_wrong_on_a_stream_ends_it_with_the_prompts_number(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        async def refused(error: type[Exception], message: str, *sent: dict[str, Any]) -> None:
            requests = Requests()
            for request in sent:
                requests.put(**request)
            with pytest.raises(error, match=message):
                async for _ in source.stream(requests):
                    pass

        opening = {"open": answer_pb2.StreamAnswersOpen(sampling=encode_sampling(SAMPLING))}
        await refused(InvalidArgumentError, "^message: a stream starts with `open`", {"credit": {"blocks": 1}})
        await refused(InvalidArgumentError, "^message: expected prompts or credit, got open", opening, opening)
        await refused(InvalidArgumentError, r"^credit\.blocks: must be 1 to", opening, {"credit": {"blocks": 0}})
        other = {"open": answer_pb2.StreamAnswersOpen(expected_vocabulary="other")}
        await refused(FailedPreconditionError, "^expected_vocabulary: other", other)
        bad = {"open": answer_pb2.StreamAnswersOpen(sampling={"top_p": 2.0})}
        await refused(InvalidArgumentError, r"^sampling\.top_p: ", bad)
        two = {"prompts": {"prompts": [{"text": b"a"}, {"text": b"b"}]}}
        await refused(
            InvalidArgumentError,
            r"^prompts\[3\]: text or messages",
            opening,
            two,
            {"prompts": {"prompts": [{"text": b"c"}, {}]}},
        )
        many = {"prompts": {"prompts": [{"text": b"a"}] * 200}}
        await refused(ResourceExhaustedError, "^prompts: at most 256 may wait", opening, many, many)

    with_source(folder, run, engine="synthetic")


@pytest.fixture
def served(folder: Path) -> Any:
    with plain_source(
        SourceConfig.model_validate({"name": "tiny", "model": str(folder), "engine": "synthetic"})
    ) as source:
        yield source


def test_client_call_and_client_stream_give_the_same_answers(served: PlainSource) -> None:
    async def main() -> None:
        client = SourceClient(served.address, "tiny")
        stream = AnswerStream(served.address, "tiny", SAMPLING, timeout_seconds=60)
        prompts = [*PROMPTS, messages_prompt([{"role": "user", "content": "Hello <|eos|>"}])]
        try:
            called = await client.generate(prompts, SAMPLING)
            streamed = await asyncio.gather(*map(stream.answers, prompts))
            for number, (one, other) in enumerate(zip(called, streamed, strict=True)):
                assert [a.prompt for a in one] == [a.prompt for a in other] == [number, number]
                assert [a.text for a in one] == [a.text for a in other]
                assert [a.seed for a in one] == [a.seed for a in other]
                assert all(a.logprobs_T is not None and len(a.logprobs_T) == len(a.token_ids_T) for a in other)
            info = await client.info()
            assert (len(info.answer_template), info.max_new_tokens, info.max_answers) == (16, 1024, 16)
            with pytest.raises(InvalidArgumentError, match=r"sampling\.num_answers: must be 1 to 16"):
                await client.generate(prompts[:1], Sampling(num_answers=17))
        finally:
            await stream.close()
            await client.close()

    asyncio.run(main())


def test_a_refused_prompt_fails_and_the_next_one_finds_a_new_stream(served: PlainSource) -> None:
    async def main() -> None:
        stream = AnswerStream(served.address, "tiny", SAMPLING, timeout_seconds=60)
        try:
            with pytest.raises((InvalidArgumentError, UnavailableError)):
                await stream.answers(AnswerPrompt(b"no json", is_messages=True))
            assert [a.number for a in await stream.answers(PROMPTS[0])] == [0, 1]
        finally:
            await stream.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": b""}, "left out the log-probabilities"),
        ({"logprobs": np.float32([0.5]).tobytes()}, "logprobs: one is no log-probability"),
        ({"logprobs": np.float32([-1, -1]).tobytes()}, "logprobs: 8 bytes for 1 tokens"),
        ({"token_ids": b"abc"}, "token_ids: 3 bytes are no int32 column"),
        ({"token_ids": np.int32([-1]).tobytes()}, "token_ids: an id is negative"),
        ({"prompt": 1}, "sent other answers than those to prompt 0"),
        ({"number": 1}, "sent other answers than those to prompt 0"),
        ({"finish_reason": 0}, "finish_reason: 0 is unknown"),
        (None, "answered 0 of 1 prompts"),
    ],
)
def test_a_broken_answer_is_the_sources_fault(changes: dict[str, Any] | None, message: str) -> None:
    good = {"token_ids": np.int32([5]).tobytes(), "logprobs": np.float32([-1]).tobytes(), "finish_reason": 3}

    class Scripted(source_pb2_grpc.SourceServiceServicer):
        async def Generate(self, request: Any, context: Any) -> answer_pb2.GenerateResponse:  # noqa: N802
            answers = [] if changes is None else [{"answers": [good | changes]}]
            return answer_pb2.GenerateResponse(answers=answers)

    async def main() -> None:
        server = grpc.aio.server()
        source_pb2_grpc.add_SourceServiceServicer_to_server(Scripted(), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = SourceClient(f"127.0.0.1:{port}", "tiny")
        try:
            with pytest.raises(UnavailableError, match=message):
                await client.generate(PROMPTS[:1], Sampling(logprobs=True))
        finally:
            await client.close()
            await server.stop(None)

    asyncio.run(main())
