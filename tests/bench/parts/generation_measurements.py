"""The measurements of `tests.bench.generation`, which says what they are."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from services.models.catalogue import resolve_model
from services.source.answers.generator import Generator
from services.source.config import SourceConfig
from services.source.scorer import Scorer
from services.wire.answer import Answer, AnswerPrompt, Sampling, messages_prompt
from tests.bench.parts.report import Report
from tests.source.answers.chi_square import chi_square, standard_deviations

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a short poem about the sea.",
    "How many days does a week have?",
    "Explain gravity to a child.",
    "What is 7 times 8?",
    "Translate 'good morning' into German.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "What does DNA stand for?",
    "Tell me a joke.",
    "How do I sort a list in Python?",
    "What is the largest ocean?",
    "Describe a cat in one sentence.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "What is the opposite of cold?",
    "Summarise the story of Cinderella.",
    "How does a bicycle work?",
    "What should I wear when it rains?",
)
PROMPTS = [messages_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]


class Source:
    """A scorer and a generator on one engine."""

    def __init__(self, scorer: Scorer, generator: Generator) -> None:
        self.scorer, self.generator = scorer, generator

    @classmethod
    async def load(cls, engine: str) -> Source:
        own: dict[str, Any] = {"engine_args": {"enforce_eager": True, "max_num_seqs": 20}} if engine == "vllm" else {}
        config = SourceConfig.model_validate(
            {"name": "smollm2", "model": MODEL, "engine": engine, "dtype": "float32", "top_k": 8, "max_tokens": 511}
            | {"max_tokens_in_flight": 8192, "generation": {"max_answers": 1024}, **own}
        )
        folder = resolve_model(MODEL)
        scorer = await Scorer.load(config, folder)
        return cls(scorer, await Generator.load(scorer, folder))

    async def ask(self, prompts: Sequence[AnswerPrompt], sampling: Sampling) -> list[list[Answer]]:
        encoded = self.generator.encode(prompts, sampling)
        return list(await asyncio.gather(*(self.generator.answers(prompt, sampling) for prompt in encoded)))

    async def timed(self, prompts: Sequence[AnswerPrompt], sampling: Sampling) -> tuple[list[list[Answer]], float]:
        """Return the answers, and new tokens a second."""
        started = time.perf_counter()
        found = await self.ask(prompts, sampling)
        num_tokens = sum(len(answer.token_ids_T) for group in found for answer in group)
        return found, num_tokens / (time.perf_counter() - started)


def same(one: list[list[Answer]], other: list[list[Answer]]) -> int:
    """Return the number of prompts whose first answers have the same tokens."""
    return sum(a[0].token_ids_T.tolist() == b[0].token_ids_T.tolist() for a, b in zip(one, other, strict=True))


async def scored_difference(source: Source, found: list[list[Answer]], sampling: Sampling) -> float:
    """Return the largest difference of a sampled token's log-probability to its score, in nats."""
    differences = []
    for prompt, [answer] in zip(source.generator.encode(PROMPTS[: len(found)], sampling), found, strict=True):
        scores = await source.scorer.engine.score([*prompt.token_ids, *answer.token_ids_T.tolist()], 4)
        assert answer.logprobs_T is not None
        gold_T = scores.gold_T[len(prompt.token_ids) - 1 :]
        differences.append(np.abs(answer.logprobs_T - gold_T))
    return float(np.concatenate(differences).max())


async def requests_left(vllm: Source, prompts: Sequence[AnswerPrompt]) -> int:
    """Return the number of requests in vLLM's front end after long answers were cancelled, and one more was given."""
    asked = asyncio.create_task(vllm.ask(prompts, Sampling(max_new_tokens=300, stop=("never said",))))
    await asyncio.wait([asked], timeout=1)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await vllm.ask(prompts[:1], Sampling(max_new_tokens=1))
    engine: Any = vllm.scorer.engine
    return int(engine._engine.output_processor.get_num_unfinished_requests()) + vllm.scorer.admission.tokens_in_flight


def exact_probabilities(prompt_ids: Sequence[int], temperature: float) -> Any:
    """Return the probabilities of the next token from a forward pass of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt_ids)])).logits[0, -1].double()
    return torch.softmax(logits / temperature, dim=-1).numpy()


async def measure(report: Report, *, quick: bool) -> None:
    prompts = PROMPTS[:5] if quick else PROMPTS
    tokens, draws = (16, 200) if quick else (32, 1000)
    greedy = Sampling(temperature=0, max_new_tokens=tokens)
    sampled = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=tokens, seed=1, logprobs=True)

    vllm = await Source.load("vllm")
    greedy_here, speed = await vllm.timed(prompts, greedy)
    company = await vllm.ask(prompts, sampled)
    alone = [(await vllm.ask([prompt], sampled))[0] for prompt in prompts]
    again = await vllm.ask(prompts, sampled)
    difference = await scored_difference(vllm, company, sampled)
    left = await requests_left(vllm, prompts)
    draw = Sampling(num_answers=draws, temperature=1.3, max_new_tokens=1, seed=3)
    [answers] = await vllm.ask(prompts[:1], draw)
    prompt_ids = vllm.generator.encode(prompts[:1], draw)[0].token_ids
    vllm.scorer.close()

    other = await Source.load("transformers")
    greedy_there, speed_there = await other.timed(prompts, greedy)
    sampled_there = await other.ask(prompts[:5], sampled)
    difference_there = await scored_difference(other, sampled_there, sampled)
    other.scorer.close()

    counts = Counter(int(answer.token_ids_T[0]) for answer in answers)
    statistic, degrees = chi_square(counts, exact_probabilities(prompt_ids, 1.3), draws)
    deviations = standard_deviations(statistic, degrees)
    num = len(prompts)
    for engine, agree, diff, rate in (
        ("vllm", same(company, alone), difference, speed),
        ("transformers", None, difference_there, speed_there),
    ):
        report.row(
            engine=engine, prompts=num, new_tokens=tokens, same_alone_and_in_company=agree, logprob_difference=diff,
            tokens_per_second=rate,
        )  # fmt: skip
    report.row(engine="vllm", prompts=1, chi_square=statistic, degrees_of_freedom=degrees, draws=draws)
    report.check("greedy answers that agree, share", same(greedy_here, greedy_there) / num, "", at_least=1.0)
    report.check("vllm, same seed alone and in company, share", same(company, alone) / num, "", at_least=0.9)
    report.check("vllm, same seed twice in the same company, share", same(company, again) / num, "", at_least=0.9)
    report.check("vllm, requests and tokens under way after cancelling", left, "", at_most=0)
    report.check("vllm, log-probability against Score", difference, "nats", at_most=1e-3)
    report.check("transformers, log-probability against Score", difference_there, "nats", at_most=1e-3)
    report.check("vllm, chi-square of first tokens in standard deviations", deviations, "", at_most=3.09)
