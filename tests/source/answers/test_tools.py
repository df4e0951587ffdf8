"""Prompts with tools: what a source takes, and the calls that it reads out of answers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fusion.v1 import source_pb2
from services.base.errors import InvalidArgumentError
from services.source.engines.base import SampledTokens
from services.wire.answer import Answer, messages_prompt
from services.wire.protocol import MAX_BLOCK_BYTES
from tests.fakes.answering import TOOLS_TEMPLATE, AnsweringSource, make_chat_model, with_source
from tests.source.test_canary import Context

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "Which?"}


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat") / "tools", template=TOOLS_TEMPLATE)


def says(source: AnsweringSource, text: str) -> None:
    """Let the engine say a text, and then end its turn."""
    vocabulary = source.scorer.vocabulary
    ids = [*vocabulary.encode(text.encode()).token_ids_T.tolist(), vocabulary.eos_id]

    async def generate(prompt_ids: Any, how: Any) -> Any:
        yield SampledTokens(ids, [-0.5] * len(ids))

    source.scorer.engine.generate = generate  # type: ignore[assignment, method-assign]


async def asked(source: AnsweringSource, tools: list[Any] | None, **sampling: Any) -> Answer:
    [[answer]] = await source.generate([messages_prompt([QUESTION], tools)], max_new_tokens=99, **sampling)
    return answer


async def format_of(source: AnsweringSource) -> str:
    info = await source.servicer.GetSourceInfo(source_pb2.GetSourceInfoRequest(), grpc_context=Context())  # type: ignore[call-arg]
    return str(info.tool_format)


def test_calls_are_read_where_the_prompt_names_tools(with_tools: Path) -> None:
    arguments = {"word": 'é "👍" <|eos|>', "more": [1, None]}
    text = f"Wait.<tool_call>{json.dumps({'name': 'look_up', 'arguments': arguments}, ensure_ascii=False)}</tool_call>"

    async def run(source: AnsweringSource) -> None:
        says(source, text)
        answer = await asked(source, [TOOL])
        [call] = answer.tool_calls
        assert (call.name, call.arguments, answer.content, answer.tool_problem) == ("look_up", arguments, b"Wait.", "")
        assert answer.text == text.encode()
        assert len(call.id) == 9
        assert call.id.isalnum()
        assert (await asked(source, [TOOL])).tool_calls == (call,)
        assert (await asked(source, [TOOL], seed=1)).tool_calls[0].id != call.id
        plain = await asked(source, None)
        assert (plain.text, plain.tool_calls, plain.content) == (text.encode(), (), b"")
        cut = await asked(source, [TOOL], stop=("look",))
        assert (cut.tool_calls, cut.content) == ((), b'Wait.<tool_call>{"name": "')
        assert cut.tool_problem.startswith("a call cannot be read: ")
        assert await format_of(source) == "hermes"

    with_source(with_tools, run, engine="synthetic")


def test_the_recipe_s_format_goes_before_the_template_s(with_tools: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        says(source, '{"name": "look_up", "parameters": {"word": "cat"}}')
        assert (await asked(source, [TOOL])).tool_calls[0].arguments == {"word": "cat"}
        assert await format_of(source) == "llama3"

    with_source(with_tools, run, engine="synthetic", generation={"tool_format": "llama3"})


def test_a_format_that_is_not_used_is_said(
    folder: Path, with_tools: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)

    async def run(source: AnsweringSource) -> None:
        await format_of(source)

    with_source(with_tools, run, engine="synthetic", generation={"tool_format": "hermes"})
    assert "tool_format" not in caplog.text
    with_source(folder, run, engine="synthetic", generation={"tool_format": "hermes"})
    assert "source tiny: generation.tool_format is not used" in caplog.text


def test_what_the_template_has_no_place_for_is_refused(folder: Path) -> None:
    """With the names of source and field; a template that writes any role has a place for results."""
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}

    async def run(source: AnsweringSource) -> None:
        async def refused(message: str, messages: list[Any], tools: list[Any] | None = None) -> None:
            with pytest.raises(InvalidArgumentError, match=rf"^prompts\[0\]\.messages: {message}"):
                await source.generate([messages_prompt(messages, tools)], max_new_tokens=1)

        no_place = "the chat template of source tiny has no place for it; allowed are system, user and assistant"
        await refused(rf"tools\[0\]: {no_place}", [QUESTION], [TOOL])
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        await refused(rf"messages\[1\]\.tool_calls\[0\]: {no_place}", [QUESTION, calling, QUESTION])
        result = {"role": "environment", "name": "interpreter", "content": "4"}
        assert await source.generate([messages_prompt([QUESTION, result])], max_new_tokens=1)
        await refused(r"tools\[0\]\.function: expected an object with a name", [QUESTION], [{"name": "look_up"}])
        broken = {**calling, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}
        await refused(r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: expected an object, got a list", [broken])
        await refused(r"messages\[0\]\.tool_calls: only an assistant's", [{**calling, "role": "user"}])
        assert await format_of(source) == ""

    with_source(folder, run, engine="synthetic")


def test_answers_with_calls_that_might_not_fit_a_message_are_refused(with_tools: Path) -> None:
    async def run(source: AnsweringSource) -> None:
        longest = source.generator._longest_token_bytes
        most = MAX_BLOCK_BYTES // (16 * (longest + 9))
        sampling = {"max_new_tokens": most, "num_answers": 16}
        with pytest.raises(InvalidArgumentError, match=r"^prompts: 1 with 16 answers"):
            await source.generate([messages_prompt([QUESTION], [TOOL])], **sampling)
        source.generator.check_size(1, source.servicer._checked_sampling(_request(most)))

    settings: dict[str, Any] = {"max_tokens": 2**20, "generation": {"max_new_tokens": 2**20}}
    with_source(with_tools, run, engine="synthetic", **settings)


def _request(max_new_tokens: int) -> Any:
    from fusion.v1 import answer_pb2

    return answer_pb2.GenerateRequest(sampling={"max_new_tokens": max_new_tokens, "num_answers": 16})
