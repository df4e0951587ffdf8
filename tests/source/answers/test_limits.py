"""What a source refuses to answer, and what it holds at once: fields, lengths, admission, cancellation."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fusion.v1 import answer_pb2, source_pb2
from services.base.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.source.engines.base import SampledTokens
from services.wire.answer import messages_prompt, text_prompt
from tests.fakes.answering import AnsweringSource, make_chat_model, with_source
from tests.source.test_canary import Context

PROMPTS = [text_prompt(text) for text in ("The man said that", "It was ", "ça va 👍", "")]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature: Input should be greater than or equal to 0"),
        ({"temperature": 0.001}, "sampling.temperature: 0 .greedy. or 0.01 to 2 is allowed"),
        ({"temperature": 3.0}, "sampling.temperature: "),
        ({"temperature": math.nan}, "sampling.temperature: "),
        ({"top_p": 0.0}, "sampling.top_p: "),
        ({"top_p": 1.5}, "sampling.top_p: "),
        ({"num_answers": 0}, "sampling.num_answers: "),
        ({"num_answers": 5}, "sampling.num_answers: must be 1 to 4, got 5"),
        ({"num_answers": 2, "temperature": 0.0}, "sampling.num_answers: all greedy answers are the same"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens: "),
        ({"max_new_tokens": 31}, "sampling.max_new_tokens: must be 1 to 30, got 31"),
        ({"seed": 2**63}, "sampling.seed: "),
        ({"stop": [""]}, "sampling.stop: each must have 1 to 256 bytes"),
        ({"stop": ["x" * 257]}, "sampling.stop: each must have 1 to 256 bytes"),
        ({"stop": ["x"] * 17}, "sampling.stop: "),
    ],
)
def test_settings_outside_their_bounds_are_named(folder: Path, sampling: dict[str, Any], message: str) -> None:
    async def run(source: AnsweringSource) -> None:
        request = answer_pb2.GenerateRequest(prompts=[{"text": b"a"}], sampling=sampling)
        with pytest.raises(InvalidArgumentError, match=f"^{message}"):
            await source.ask(request)

    limits = {"max_new_tokens": 30, "max_answers": 4}
    with_source(folder, run, engine="synthetic", generation=limits)


def test_prompts_outside_their_bounds_are_named_before_any_work(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        async def refused(message: str, *prompts: dict[str, bytes], **fields: Any) -> None:
            fields = {"sampling": {"max_new_tokens": 30}} | fields
            with pytest.raises((InvalidArgumentError, FailedPreconditionError), match=message):
                await source.ask(answer_pb2.GenerateRequest(prompts=prompts, **fields))

        good = {"text": b"the"}
        await refused("^prompts: 1 to 256 are allowed, got 0")
        await refused("^prompts: 1 to 256 are allowed, got 257", *[good] * 257)
        await refused(r"^prompts\[1\]: text or messages must be set", good, {})
        await refused(r"^prompts\[1\]\.text: not UTF-8 at byte 1", good, {"text": b"a\xff"})
        await refused(r"^prompts\[0\]\.text: 3001 bytes; at most 3000", {"text": b"a" * 3001})
        await refused(
            r"^prompts\[1\]: \d+ tokens and max_new_tokens = 30 are more than the 101", good, {"text": b"9" * 90}
        )
        await refused("^expected_vocabulary: other was asked for", good, expected_vocabulary="other")
        await refused(r"^prompts\[0\]\.messages: not JSON", {"messages": b"[{]"})
        await refused(r"^prompts\[0\]\.messages: messages: expected a list, got null", {"messages": b"{}"})
        await refused(r"^prompts\[0\]\.messages: messages: expected at least one", {"messages": b"[]"})
        await refused(r"^prompts\[0\]\.messages: messages\[0\]\.role: 'x' is none of", {"messages": b'[{"role":"x"}]'})
        message = b'[{"role":"user","content":1}]'
        await refused(r"^prompts\[0\]\.messages: messages\[0\]\.content: expected a string", {"messages": message})
        assert asked == 0

    asked = 0

    async def counting(source: AnsweringSource) -> None:
        generate = source.scorer.engine.generate

        def counted(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            return generate(*arguments)

        source.scorer.engine.generate = counted  # type: ignore[method-assign]
        await run(source)

    settings = {"max_tokens": 100, "max_text_bytes": 3000, "generation": {"max_new_tokens": 30}}
    with_source(folder, counting, engine="synthetic", **settings)


def test_messages_to_a_model_without_a_template_are_refused(tmp_path: Path) -> None:
    plain = make_chat_model(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()

    async def run(source: AnsweringSource) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^prompts\[0\]\.messages: the model has no chat template"):
            await source.generate([messages_prompt([{"role": "user", "content": "Hello"}])], max_new_tokens=7)
        info = await source.servicer.GetSourceInfo(source_pb2.GetSourceInfoRequest(), grpc_context=Context())  # type: ignore[call-arg]
        assert (info.answer_template, info.max_new_tokens, info.max_answers) == ("", 7, 3)
        assert len((await source.generate(PROMPTS[:1], max_new_tokens=7))[0]) == 1

    with_source(plain, run, engine="synthetic", generation={"max_new_tokens": 7, "max_answers": 3})


def test_a_cancelled_answer_frees_the_engine(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        steps, started = 0, asyncio.Event()
        forward = source.scorer.engine._model.forward  # type: ignore[attr-defined]
        loop = asyncio.get_running_loop()

        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 3:
                loop.call_soon_threadsafe(started.set)
            return forward(*arguments, **more)

        source.scorer.engine._model.forward = counted  # type: ignore[attr-defined]
        # The model would have to go on for 50,000 steps.
        long = asyncio.create_task(
            source.generate(PROMPTS[:1], num_answers=16, max_new_tokens=3000, stop=("\x00\x01",))
        )
        await started.wait()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert source.scorer.admission.tokens_in_flight == 0
        [answer] = (await source.generate(PROMPTS[:1], max_new_tokens=2))[0]
        assert len(answer.token_ids_T) <= 2
        assert steps < 1000

    settings = {"max_tokens": 3100, "max_tokens_in_flight": 3200, "generation": {"max_new_tokens": 3000}}
    with_source(folder, run, **settings)


def test_admission_counts_prompt_and_new_tokens(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        running, most, generate = 0, 0, source.scorer.engine.generate

        async def watched(prompt_ids: Sequence[int], how: Any) -> Any:
            nonlocal running, most
            num_tokens = len(prompt_ids) + how.max_new_tokens
            running += num_tokens
            most = max(most, running)
            try:
                async for tokens in generate(prompt_ids, how):
                    yield tokens
            finally:
                running -= num_tokens

        source.scorer.engine.generate = watched  # type: ignore[assignment]
        await source.generate(PROMPTS, num_answers=4, max_new_tokens=40)
        assert 100 < most <= 201

    settings = {"max_tokens": 200, "max_tokens_in_flight": 201, "synthetic": {"delay_seconds": 0.01}}
    with_source(folder, run, engine="synthetic", **settings)


def test_an_implausible_answer_is_refused_and_a_broken_model_serves_none(folder: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        async def nonsense(prompt_ids: Sequence[int], how: Any) -> Any:
            yield SampledTokens([5], [math.nan])

        source.scorer.engine.generate = nonsense  # type: ignore[assignment]
        with pytest.raises(InvalidArgumentError, match=r"^prompts\[0\]: the model has no answer"):
            await source.generate(PROMPTS[:1])
        source.scorer.problem = "weights are gone"
        with pytest.raises(UnavailableError, match="weights are gone"):
            await source.generate(PROMPTS[:1])

    with_source(folder, run, engine="synthetic")
