"""A source in this process, asked for answers without a server, and a tiny model that has a chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fusion.v1 import answer_pb2
from services.source.config import SourceConfig
from services.source.servicer import SourceServicer
from services.wire.answer import Answer, AnswerPrompt, Sampling, decode_answer, encode_prompt, encode_sampling
from tests.fakes.tiny_model import make_tiny_model
from tests.source.test_canary import Context

TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
"""Turns between control tokens that tiny models have."""
TOOLS_TEMPLATE = (
    "{% if tools %}<|bos|>tools\n{{ tools | tojson }}<|eos|>\n{% endif %}"
    "{% for message in messages %}<|bos|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|eos|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
"""The same with tools and calls, in the manner of Hermes."""


def make_chat_model(folder: Path, *, vocabulary_size: int = 400, seed: int = 2, template: str = TEMPLATE) -> Path:
    """Make a tiny model with a template; return its folder."""
    made = make_tiny_model(folder, vocabulary_size=vocabulary_size, seed=seed)
    (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made


class AnsweringSource:
    """A source's methods, called as Serve calls them."""

    def __init__(self, servicer: SourceServicer) -> None:
        self.servicer = servicer
        self.scorer, self.generator = servicer._scorer, servicer._generator

    async def generate(self, prompts: Sequence[AnswerPrompt], **sampling: Any) -> list[list[Answer]]:
        request = answer_pb2.GenerateRequest(
            prompts=map(encode_prompt, prompts), sampling=encode_sampling(Sampling(**sampling))
        )
        return answers_in(await self.ask(request))

    async def ask(self, request: answer_pb2.GenerateRequest) -> answer_pb2.GenerateResponse:
        response: answer_pb2.GenerateResponse = await self.servicer.Generate(request, grpc_context=Context())  # type: ignore[call-arg]
        return response

    def stream(self, requests: Any) -> Any:
        """Return the frames of `StreamAnswers`."""
        return self.servicer.StreamAnswers(requests, grpc_context=Context())  # type: ignore[call-arg]


def answers_in(response: answer_pb2.GenerateResponse | answer_pb2.StreamAnswersResponse) -> list[list[Answer]]:
    """Return the answers of a response or a frame, by prompt."""
    return [[decode_answer(answer) for answer in group.answers] for group in response.answers]


def with_source(folder: Path, run: Callable[[AnsweringSource], Awaitable[None]], **settings: Any) -> None:
    """Run a coroutine with a source on engine transformers; `settings` are the source's."""

    async def main() -> None:
        servicer = SourceServicer.__new__(SourceServicer)
        values = {"name": "tiny", "model": str(folder), "engine": "transformers", "top_k": 8} | settings
        await servicer.__init__(SourceConfig.model_validate(values))  # type: ignore[misc]  # as Serve does
        try:
            async with asyncio.timeout(120):
                await run(AnsweringSource(servicer))
        finally:
            await servicer.close()

    asyncio.run(main())
