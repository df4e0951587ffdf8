"""Turns of conversations scored by a source, compared with a plain forward pass over transformers' own rendering."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers

from fusion.v1 import block_pb2, source_pb2, source_pb2_grpc
from services.base.errors import FailedPreconditionError, InvalidArgumentError
from services.fusion.config import ServiceConfig, SourceEndpoint
from services.fusion.sources.remote import RemoteSource, problem_with
from services.models.chat_template import PLAIN
from services.source.client import SourceClient
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.messages import Message, Messages
from services.wire.passage import Passage
from tests.fakes.services.plain_source import PlainSource, plain_source
from tests.fakes.tiny_model import make_tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m.role + '\n' + (m.content or '') | trim + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
MESSAGES: list[Message] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Who was <|eos|> there?"},
    {"role": "assistant", "content": "They were. 👍"},
    {"role": "user", "content": "And\nthen?"},
]
ANSWERS = ("It was not the man — but all of them.", "  the of and\n", "a<|eos|>b")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("chat") / "model", vocabulary_size=400, seed=3)


def config(model: Path, **values: Any) -> SourceConfig:
    fixed = {"name": "chat", "model": str(model), "engine": "transformers", "dtype": "float32", "top_k": 8}
    return SourceConfig.model_validate(fixed | {"chat_template": TEMPLATE, "max_tokens": 200} | values)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[PlainSource]:
    with plain_source(config(model)) as source:
        yield source


def turn(answer: str, *, ends: bool = True) -> Passage:
    return Passage(answer.encode(), ends_document=ends, messages=Messages(MESSAGES).to_bytes())


def oracle(model: Path, passage: Passage) -> float:
    """The log-probability of the words and their end of turn in the rendering that transformers makes."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # Words that look like the end of a turn are put in as their own bytes' tokens, by hand.
    pieces: list[int] = []

    def plain(text: str) -> list[int]:
        head, *others = text.split("<|eos|>")
        ids = tokenizer(head, add_special_tokens=False)["input_ids"] if head else []
        for other in others:
            joined = tokenizer.backend_tokenizer
            joined.encode_special_tokens = True
            ids = joined.encode(head + "<|eos|>" + other, add_special_tokens=False).ids
            joined.encode_special_tokens = False
        return list(ids)

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for message in MESSAGES:
        pieces += [bos, *plain(message["role"] + "\n" + message["content"].strip()), eos]
    start = [*pieces, bos, *plain("assistant\n")]
    words = [*plain(passage.text.decode().strip()), eos]
    with torch.inference_mode():
        logits = language_model(torch.tensor([[*start, *words]])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return float(sum(logprobs[len(start) + n - 1, token_id] for n, token_id in enumerate(words)))


@pytest.mark.parametrize("answer", ANSWERS)
def test_rows_are_what_the_model_says_of_the_rendered_turn(model: Path, answer: str) -> None:
    async def score() -> None:
        scorer = await Scorer.load(config(model), model)
        try:
            passage = turn(answer)
            [prompt] = scorer.encode([passage])
            block = await scorer.score(prompt, 8)
        finally:
            scorer.engine.close()
        block.validate()
        assert problem_with(block, passage, scorer.vocabulary, 8) is None
        assert block.text_bytes == answer.encode() and block.ends_document
        assert block.byte_ends_T[-2] == len(answer.encode())
        assert block.gold_T.sum() == pytest.approx(oracle(model, passage), abs=1e-3)
        assert block.mask_T[1:-2].all() and block.mask_T[-1]
        assert block.mask_T.all() == (answer == answer.strip())

    asyncio.run(score())


def test_documents_and_turns_in_one_call_over_grpc(served: PlainSource, model: Path) -> None:
    async def ask() -> None:
        client = SourceClient(served.address, "chat")
        try:
            info = await client.info()
            assert len(info.chat_template) == 16 and info.eos_token == "<|eos|>"
            passages = [Passage(b"the man", ends_document=True), turn(ANSWERS[0]), Passage(b" and", b"the man")]
            together = await client.score(passages, top_k=8)
            for passage, block in zip(passages, together, strict=True):
                [alone] = await client.score([passage], top_k=8)
                np.testing.assert_allclose(alone.gold_T, block.gold_T, atol=1e-5)
            assert not np.allclose(together[1].gold_T[0], oracle(model, turn("them", ends=False)))
        finally:
            await client.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("messages", "preceding", "reason"),
    [
        (b"no", b"", r"contexts\[0\].messages: not JSON"),
        (b'{"chat": []}', b"", "'chat' is not known; allowed are messages and tools"),
        (b'{"messages": 3}', b"", "messages: expected a list, got a number"),
        (b'[{"role": "bot", "content": "a"}]', b"", r"messages\[0\].role: 'bot' is none of system, user"),
        (b'[{"role": "user", "content": null}]', b"", r"messages\[0\].content: expected a string"),
        (b'[{"role": "user", "content": [{"text": "a"}]}]', b"", r"messages\[0\].content: .* got a list"),
        (b'[{"role": "assistant", "content": null, "tool_calls": [1]}]', b"", r"tool_calls: expected a list of obj"),
        (b'{"messages": [], "tools": [1]}', b"", "tools: expected a list of objects"),
        (b'[{"role": "user", "content": "\\ud800"}]', b"", "lone surrogate"),
        (b"[]", b"before", r"contexts\[0\]: preceding and messages are both set"),
        (b'[{"role": "user", "content": "' + b"a" * 40_000 + b'"}]', b"", "bytes with what precedes them; at most"),
        (b'[{"role": "user", "content": "' + b"the " * 200 + b'"}]', b"", "tokens with context and EOS; source chat"),
    ],
)
def test_what_is_no_list_of_messages_is_refused_by_its_field(
    served: PlainSource, messages: bytes, preceding: bytes, reason: str
) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = source_pb2_grpc.SourceServiceStub(channel)
        context = block_pb2.TextContext(preceding=preceding, messages=messages)
        with pytest.raises(grpc.RpcError, match=reason) as caught:
            stub.Score(source_pb2.ScoreRequest(texts=[b"a"], contexts=[context]))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_source_without_a_template_says_what_to_set(model: Path) -> None:
    with plain_source(config(model, chat_template=None)) as source:

        async def ask() -> None:
            client = SourceClient(source.address, "chat")
            try:
                assert (await client.info()).chat_template == ""
                with pytest.raises(InvalidArgumentError, match=r"contexts\[0\].messages: messages need chat_template"):
                    await client.score([turn("a")], top_k=8)
            finally:
                await client.close()

        asyncio.run(ask())


def test_a_source_with_another_template_than_configured_is_not_asked(served: PlainSource, model: Path) -> None:
    def remote(chat_template: str | None) -> RemoteSource:
        endpoint = SourceEndpoint(
            name="chat",
            model=str(model),
            address=served.address,
            application="chat",
            top_k=8,
            chat_template=chat_template,
        )
        return RemoteSource(endpoint, ServiceConfig())

    async def ask() -> None:
        same, other = remote(TEMPLATE), remote(PLAIN)
        try:
            scored = await same.score(turn(ANSWERS[0]), streamed=True)
            assert scored.identity.chat_template == same.chat_template
            with pytest.raises(FailedPreconditionError, match="has the chat template"):
                await other.identity()
        finally:
            await same.close()
            await other.close()

    asyncio.run(ask())


def test_a_template_may_be_a_file_and_travels_as_its_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert config(tmp_path, chat_template=str(tmp_path / "chat.jinja")).chat_template == TEMPLATE
    (tmp_path / "empty.jinja").write_text("no template")
    for wrong in ("empty.jinja", "missing.jinja"):
        with pytest.raises(ValueError, match="chat_template"):
            config(tmp_path, chat_template=str(tmp_path / wrong))


def test_a_model_without_a_template_of_its_own_is_refused_when_it_starts(model: Path) -> None:
    async def load() -> None:
        await Scorer.load(config(model, chat_template="model"), model)

    with pytest.raises(ValueError, match="chat_template: the model has no chat template of its own; set `plain`"):
        asyncio.run(load())
