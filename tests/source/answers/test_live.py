"""Answers through Ray Serve: the real SmolLM2 on vLLM, asked by call, by stream and by `fusion chat`."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fusion_core.vocabulary import Vocabulary
from services.base.errors import InvalidArgumentError
from services.cli.app import app
from services.models.catalogue import resolve_model
from services.source.answers.generator import Generator
from services.source.client import AnswerStream, SourceClient
from services.source.engines.config import TransformersConfig
from services.source.scorer import Scorer
from services.wire.answer import Answer, Sampling, messages_prompt, text_prompt
from services.wire.passage import Passage
from tests.fakes.live import Live

pytestmark = pytest.mark.timeout(900)

QUESTIONS = ("What is the capital of France?", "Name three colours.", "Say <|im_end|> twice.", "Who wrote Hamlet?")
PROMPTS = [*(messages_prompt([{"role": "user", "content": question}]) for question in QUESTIONS), text_prompt("Once ")]
GREEDY = Sampling(temperature=0, max_new_tokens=12, logprobs=True)


def ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids_T.tolist() for answer in answers]


def test_greedy_answers_of_vllm_are_those_of_transformers(live: Live) -> None:
    async def main() -> None:
        client = SourceClient(live.deployment.grpc_address, "smollm2")
        try:
            served = [answers[0] for answers in await client.generate(PROMPTS, GREEDY)]
            info = await client.info()
        finally:
            await client.close()
        assert (len(info.answer_template), info.max_new_tokens) == (16, 255)
        config = live.recipe.sources[0].model_copy(update={"engine": TransformersConfig(dtype="float32")})
        folder = resolve_model(config.model)
        scorer = await Scorer.load(config, folder)
        generator = await Generator.load(scorer, folder)
        for prompt, answer in zip(generator.encode(PROMPTS, GREEDY), served, strict=True):
            [here] = await generator.answers(prompt, GREEDY)
            assert ids([answer]) == ids([here])
            assert (answer.text, answer.finish_reason, answer.seed) == (here.text, here.finish_reason, here.seed)
            assert answer.logprobs_T is not None
            assert here.logprobs_T is not None
            np.testing.assert_allclose(answer.logprobs_T, here.logprobs_T, atol=1e-3)
        scorer.close()

    asyncio.run(main())


def test_a_stream_of_sampled_answers_gives_what_calls_give_and_score_agrees(live: Live) -> None:
    async def main() -> None:
        sampling = Sampling(num_answers=2, temperature=0.8, top_p=0.9, max_new_tokens=10, seed=3, logprobs=True)
        client = SourceClient(live.deployment.grpc_address, "smollm2")
        stream = AnswerStream(live.deployment.grpc_address, "smollm2", sampling, timeout_seconds=300)
        try:
            streamed = await asyncio.gather(*map(stream.answers, PROMPTS))
            assert stream.replica
            called = await client.generate(PROMPTS, sampling)
            assert list(map(ids, streamed)) == list(map(ids, called))
            vocabulary = Vocabulary.from_pretrained(resolve_model("smollm2-135m-instruct"), eos_token="<|endoftext|>")
            compared = 0
            for answer in streamed[-1]:  # to a text, which Score takes as context
                text = Passage(answer.text, context=b"Once ")
                if vocabulary.encode_batch([answer.text], continues=True)[0].token_ids_T.tolist() != ids([answer])[0]:
                    continue  # the same bytes in other tokens
                [block] = await client.score([text], top_k=4)
                assert answer.logprobs_T is not None
                np.testing.assert_allclose(answer.logprobs_T, block.gold_T, atol=1e-3)
                compared += 1
            assert compared
            with pytest.raises(InvalidArgumentError, match=r"prompts\[0\]: \d+ tokens and max_new_tokens = 255"):
                await client.generate(PROMPTS[:1], replace_tokens(sampling, 255))
        finally:
            await stream.close()
            await client.close()

    asyncio.run(main())


def replace_tokens(sampling: Sampling, max_new_tokens: int) -> Sampling:
    return sampling.model_copy(update={"max_new_tokens": max_new_tokens})


def test_a_stop_string_and_a_cancelled_call_leave_the_engine_to_others(live: Live) -> None:
    async def main() -> None:
        client = SourceClient(live.deployment.grpc_address, "smollm2")
        try:
            [[whole]] = await client.generate(PROMPTS[:1], GREEDY)
            word = whole.text.split()[2].decode()
            [[cut]] = await client.generate(PROMPTS[:1], GREEDY.model_copy(update={"stop": (word,)}))
            assert cut.finish_reason == "stop_string"
            assert cut.text == whole.text[: whole.text.index(word.encode())]
            long = Sampling(num_answers=4, max_new_tokens=200)
            asked = asyncio.create_task(client.generate(PROMPTS[-1:], long))
            await asyncio.wait([asked], timeout=1)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
            assert ids((await client.generate(PROMPTS[:1], GREEDY))[0]) == ids([whole])
        finally:
            await client.close()

    asyncio.run(main())


def test_fusion_chat_talks_to_it(live: Live, recipe_file: Path) -> None:
    options = ["--once", QUESTIONS[0], "--temperature", "0", "--max-new-tokens", "12"]
    several = CliRunner().invoke(app, ["chat", str(recipe_file), *options])
    assert (several.exit_code, "--source: name one of smollm2, tiny" in several.output) == (2, True)
    done = CliRunner().invoke(app, ["chat", str(recipe_file), "--source", "smollm2", *options])
    assert done.exit_code == 0, done.output
    assert "Paris" in done.output
