"""Answers: greedy and sampled tokens against plain forward passes, seeds, stop strings, limits, cancellation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fusion.v1 import block_pb2, source_pb2
from fusion_core.arrays import Float64
from fusion_core.vocabulary import Vocabulary
from services.wire.answer import Answer, Sampling, text_prompt
from services.wire.block import decode_block
from tests.fakes.answering import AnsweringSource, with_source
from tests.source.answers.chi_square import chi_square, standard_deviations
from tests.source.test_canary import Context

PROMPTS = [text_prompt(text) for text in ("The man said that", "It was ", "ça va 👍", "")]
ENGINES = ["transformers", "synthetic"]


class Oracle:
    """The next token's log-probabilities from a forward pass of its own."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def prompt_ids(self, text: bytes) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(text.decode(), add_special_tokens=False)["input_ids"]]

    def row(self, ids: Sequence[int]) -> Float64:
        with torch.no_grad():
            logits = self.model(torch.tensor([list(ids)])).logits[0, -1].double()
        logprobs: Float64 = torch.log_softmax(logits, dim=-1).numpy()
        return logprobs


def test_greedy_answers_are_the_likeliest_tokens_and_come_with_their_log_probabilities(folder: Path) -> None:
    oracle = Oracle(folder)

    async def run(source: AnsweringSource) -> None:
        found = await source.generate(PROMPTS, temperature=0, max_new_tokens=12, logprobs=True)
        for number, ([answer], prompt) in enumerate(zip(found, PROMPTS, strict=True)):
            ids = oracle.prompt_ids(prompt.content)
            assert (answer.prompt, answer.number, answer.num_prompt_tokens) == (number, 0, len(ids))
            assert answer.logprobs_T is not None
            for token_id, logprob in zip(answer.token_ids_T, answer.logprobs_T, strict=True):
                row = oracle.row(ids)
                assert token_id == row.argmax()
                assert logprob == pytest.approx(row[token_id], abs=1e-4)
                ids.append(int(token_id))
            text = b"".join(map(source.scorer.vocabulary.token_bytes, answer.token_ids_T.tolist()))
            assert answer.text == text
            assert answer.finish_reason == "length"
            assert len(answer.token_ids_T) == 12

    with_source(folder, run)


def tempered(logprobs_V: Float64, temperature: float, top_p: float) -> Float64:
    """Return probabilities at a temperature, cut to the fewest likeliest tokens that have `top_p` together."""
    weights_V = np.exp(logprobs_V / temperature)
    weights_V /= weights_V.sum()
    order = np.argsort(-weights_V)
    num_kept = int((np.cumsum(weights_V[order]) < top_p).sum()) + 1
    cut_V = np.zeros_like(weights_V)
    cut_V[order[:num_kept]] = weights_V[order[:num_kept]]
    return np.asarray(cut_V / cut_V.sum())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 1.0), (0.9, 0.7)])
def test_tokens_are_sampled_with_their_exact_probabilities(folder: Path, temperature: float, top_p: float) -> None:
    oracle, prompt, total = Oracle(folder), PROMPTS[0], 600
    row = oracle.row(oracle.prompt_ids(prompt.content))

    async def run(source: AnsweringSource) -> None:
        settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 1}
        [answers] = await source.generate([prompt], num_answers=total, **settings)
        counts = Counter(int(answer.token_ids_T[0]) for answer in answers)
        probabilities = tempered(row, temperature, top_p)
        assert not [i for i in counts if probabilities[i] == 0]
        assert standard_deviations(*chi_square(counts, probabilities, total)) < 3.09
        # The test can tell: another temperature does not pass.
        assert standard_deviations(*chi_square(counts, tempered(row, temperature * 0.6, 1.0), total)) > 3.09

    with_source(folder, run, generation={"max_answers": total})


def test_log_probabilities_of_sampled_tokens_are_what_score_says(folder: Path) -> None:
    """At another temperature, too: they are the model's own."""

    async def run(source: AnsweringSource) -> None:
        settings = {"temperature": 1.5, "top_p": 0.9, "logprobs": True}
        [answers] = await source.generate(PROMPTS[:1], num_answers=8, max_new_tokens=20, **settings)
        ids = source.generator.encode(PROMPTS[:1], Sampling(max_new_tokens=20))[0].token_ids
        for answer in answers:
            scores = await source.scorer.engine.score([*ids, *answer.token_ids_T.tolist()], 4)
            assert answer.logprobs_T is not None
            np.testing.assert_allclose(answer.logprobs_T, scores.gold_T[len(ids) - 1 :], atol=1e-3)
        [words] = await source.generate(PROMPTS[:1], num_answers=16, max_new_tokens=1, **settings)
        scored = 0
        for answer in words:
            if not answer.text.isascii() or not answer.text:
                continue
            request = source_pb2.ScoreRequest(
                texts=[answer.text],
                contexts=[block_pb2.TextContext(preceding=PROMPTS[0].content)],
                dtype=block_pb2.LOGPROB_DTYPE_FLOAT32,
            )
            response = await source.servicer.Score(request, grpc_context=Context())  # type: ignore[call-arg]
            block = decode_block(response.blocks[0])
            assert block.token_ids_T.tolist() == answer.token_ids_T.tolist()
            assert answer.logprobs_T is not None
            np.testing.assert_allclose(answer.logprobs_T, block.gold_T, atol=1e-3)
            scored += 1
        assert scored >= 8

    with_source(folder, run)


def ids_of(answers: list[list[Answer]]) -> list[list[list[int]]]:
    return [[answer.token_ids_T.tolist() for answer in group] for group in answers]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_depends_on_seed_prompt_and_number_alone(folder: Path, engine: str) -> None:
    async def run(source: AnsweringSource) -> None:
        together = await source.generate(PROMPTS, num_answers=3, max_new_tokens=8, seed=5)
        backwards = await source.generate(PROMPTS[::-1], num_answers=3, max_new_tokens=8, seed=5)
        alone = [(await source.generate([prompt], num_answers=3, max_new_tokens=8, seed=5))[0] for prompt in PROMPTS]
        assert ids_of(together) == ids_of(backwards)[::-1] == ids_of(alone)
        [rest] = await source.generate(PROMPTS[:1], num_answers=2, first_answer=1, max_new_tokens=8, seed=5)
        assert [(a.number, a.token_ids_T.tolist()) for a in rest] == [(n, ids_of(together)[0][n]) for n in (1, 2)]
        [first] = (await source.generate(PROMPTS[:1], max_new_tokens=8, seed=5))[0]
        assert first.token_ids_T.tolist() == together[0][0].token_ids_T.tolist()
        assert len({tuple(ids) for group in ids_of(together) for ids in group}) == 12
        other = await source.generate(PROMPTS, num_answers=3, max_new_tokens=8, seed=6)
        assert ids_of(other) != ids_of(together)
        # The hash that the documentation names.
        content = hashlib.sha256(b"text:" + PROMPTS[1].content).digest()
        numbers = (5).to_bytes(8, "little") + (2).to_bytes(8, "little")
        digest = hashlib.sha256(b"llm-fusion answer" + numbers + content).digest()
        assert together[1][2].seed == int.from_bytes(digest[:8], "little") // 2

    with_source(folder, run, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_ends_in_front_of_a_stop_string_and_behind_the_token_that_completes_it(
    folder: Path, engine: str
) -> None:
    async def run(source: AnsweringSource) -> None:
        settings = {"num_answers": 4, "max_new_tokens": 24, "seed": 1, "logprobs": True}
        vocabulary, checked = source.scorer.vocabulary, 0
        [plain] = await source.generate(PROMPTS[:1], **settings)
        for answer in plain:
            tokens = [vocabulary.token_bytes(i) for i in answer.token_ids_T.tolist()]
            joint = len(b"".join(tokens[:10]))
            stop = answer.text[joint - 1 : joint + 1]  # the last byte of one token and the first of the next
            if not stop.isascii() or len(stop) < 2:
                continue
            [stopped] = await source.generate(PROMPTS[:1], **settings, stop=("never there", stop.decode()))
            cut = stopped[answer.number]
            at = answer.text.index(stop)
            assert cut.text == answer.text[:at]
            assert cut.finish_reason == "stop_string"
            ends = np.cumsum([len(token) for token in tokens])
            num_tokens = int(np.searchsorted(ends, at + len(stop))) + 1
            assert cut.token_ids_T.tolist() == answer.token_ids_T[:num_tokens].tolist()
            assert cut.logprobs_T is not None
            assert len(cut.logprobs_T) == num_tokens
            checked += 1
        assert checked

    with_source(folder, run, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_eos_ends_an_answer_and_has_no_bytes(folder: Path, engine: str) -> None:
    eos = Vocabulary.from_pretrained(folder).eos_id

    async def run(source: AnsweringSource) -> None:
        found = await source.generate(PROMPTS[:1], num_answers=16, max_new_tokens=1000, logprobs=True)
        ended = [answer for answer in found[0] if answer.finish_reason == "stop_token"]
        assert ended
        for answer in ended:
            assert answer.token_ids_T[-1] == eos
            assert eos not in answer.token_ids_T[:-1]
            assert answer.text == b"".join(map(source.scorer.vocabulary.token_bytes, answer.token_ids_T.tolist()))

    with_source(folder, run, engine=engine)
