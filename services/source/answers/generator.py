"""Prompts in, answers out: tokenise, let the engine sample within its limits, cut at stop strings."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from services.base.concurrency import gather_or_cancel
from services.base.errors import InvalidArgumentError, UnavailableError
from services.source.answers.chat_prompt import ChatPrompt, ChatPrompts
from services.source.engines.base import TokenSampling
from services.source.scorer import Scorer
from services.wire.answer import Answer, AnswerPrompt, FinishReason, Sampling, answer_seed
from services.wire.protocol import MAX_BLOCK_BYTES

logger = logging.getLogger("ray.serve")

_TOKEN_COLUMNS_BYTES = 8
_ANSWER_BYTES = 64
"""Bytes of an answer's message beside its text and columns, at most."""
_TOOL_COPIES = 3
"""Times that the text of an answer to a prompt with tools is sent, at most: as text, words and calls."""
_LEAST_LOGPROB = -1e4


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt, its number among those that were asked, its ids (special tokens included), and if it names tools."""

    number: int
    prompt: AnswerPrompt
    token_ids: tuple[int, ...]
    has_tools: bool = False


class Generator:
    """Answers prompts with the model of a `Scorer`, under the same limits: what it scores and samples share the engine.

    Attributes:
        chat: renders messages for this model.
        max_new_tokens: most new tokens of an answer.
    """

    def __init__(self, scorer: Scorer, chat: ChatPrompts) -> None:
        self.chat = chat
        self.max_new_tokens = min(scorer.config.generation.max_new_tokens, scorer.config.max_tokens)
        self._scorer = scorer
        offsets_V1 = chat.vocabulary.byte_table.offsets_V1
        self._longest_token_bytes = int(np.diff(offsets_V1).max())

    @classmethod
    async def load(cls, scorer: Scorer, folder: Path) -> Generator:
        """Read the chat template of the scorer's model."""
        config = scorer.config

        def read() -> ChatPrompts:
            given = config.generation.tool_format
            chat = ChatPrompts(folder, scorer.vocabulary, scorer.chat, source=config.name, tool_format=given)
            if given is not None and chat.tool_format is None:
                logger.warning(
                    "source %s: generation.tool_format is not used: no prompt may name tools, for which the chat "
                    "template has no place",
                    config.name,
                )
            return chat

        return cls(scorer, await asyncio.to_thread(read))

    def check(self, sampling: Sampling) -> None:
        """Raise InvalidArgumentError naming the field of the settings that this source does not allow."""
        most = self._scorer.config.generation.max_answers
        if sampling.num_answers > most:
            raise InvalidArgumentError(f"sampling.num_answers: must be 1 to {most}, got {sampling.num_answers}")
        if sampling.num_answers > 1 and sampling.temperature == 0:
            raise InvalidArgumentError("sampling.num_answers: all greedy answers are the same; ask for 1")
        if sampling.max_new_tokens > self.max_new_tokens:
            raise InvalidArgumentError(
                f"sampling.max_new_tokens: must be 1 to {self.max_new_tokens}, got {sampling.max_new_tokens}"
            )

    def check_size(self, num_prompts: int, sampling: Sampling, *, has_tools: bool = False) -> None:
        """Raise InvalidArgumentError when the answers might not fit a message, before any work."""
        per_token = self._longest_token_bytes * (_TOOL_COPIES if has_tools else 1) + _TOKEN_COLUMNS_BYTES
        per_answer = sampling.max_new_tokens * per_token + _ANSWER_BYTES
        if (num_bytes := num_prompts * sampling.num_answers * per_answer) > MAX_BLOCK_BYTES:
            raise InvalidArgumentError(
                f"prompts: {num_prompts} with {sampling.num_answers} answers of {sampling.max_new_tokens} tokens can "
                f"take {num_bytes} bytes, and {MAX_BLOCK_BYTES} fit a message; ask for less at once"
            )

    def encode(self, prompts: Sequence[AnswerPrompt], sampling: Sampling, first: int = 0) -> list[EncodedPrompt]:
        """Return the prompts in tokens; raises InvalidArgumentError naming the one that is wrong or too long.

        BOS stands in front of a text, as when it is scored; what stands before messages is the template's business.
        """
        most = self._scorer.config.max_tokens + 1  # BOS or whatever the template begins with included
        encoded = []
        for number, prompt in enumerate(prompts, first):
            written = self._written(prompt, f"prompts[{number}]")
            ids = written.token_ids
            if len(ids) + sampling.max_new_tokens > most:
                raise InvalidArgumentError(
                    f"prompts[{number}]: {len(ids)} tokens and max_new_tokens = {sampling.max_new_tokens} are more "
                    f"than the {most} that source {self._scorer.config.name} holds"
                )
            encoded.append(EncodedPrompt(number, prompt, tuple(ids), written.has_tools))
        if any(prompt.has_tools for prompt in encoded):
            self.check_size(len(encoded), sampling, has_tools=True)
        return encoded

    def _written(self, prompt: AnswerPrompt, field: str) -> ChatPrompt:
        if prompt.is_messages:
            return self.chat.encode(prompt.content, f"{field}.messages")
        ids = self._scorer.vocabulary.encode(prompt.content).token_ids_T.tolist()
        return ChatPrompt([self._scorer.bos_id, *ids], has_tools=False)

    async def answers(self, prompt: EncodedPrompt, sampling: Sampling) -> list[Answer]:
        """Return all answers to a prompt, sampled side by side as far as the engine has room.

        Raises InvalidArgumentError when the model has no plausible answer to this prompt, UnavailableError once it is
        known to be broken.
        """
        return await gather_or_cancel(*(self._answer(prompt, sampling, n) for n in sampling.numbers))

    async def _answer(self, prompt: EncodedPrompt, sampling: Sampling, number: int) -> Answer:
        seed = answer_seed(sampling.seed, prompt.prompt, number)
        how = TokenSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            seed=seed,
            stop_ids=self.chat.stop_ids,
            piecewise=bool(sampling.stop),
        )
        text = _AnswerText(self.chat.vocabulary.token_bytes, sampling.stop)
        ids, logprobs = await self._ask_engine(prompt, how, text)
        logprobs_T = np.asarray(logprobs, dtype=np.float32)
        token_ids_T = np.asarray(ids, dtype=np.int32)
        if not ((logprobs_T <= 1e-3) & (logprobs_T > _LEAST_LOGPROB)).all():
            await self._scorer.judge(list(prompt.token_ids), "a sampled token's log-probability is none")
        if self._scorer.problem is not None:
            raise UnavailableError(self._scorer.problem)
        finish: FinishReason = "length"
        if text.stopped:
            finish = "stop_string"
        elif ids[-1] in self.chat.stop_ids:
            finish = "stop_token"
        answer = Answer(
            prompt=prompt.number,
            number=number,
            text=bytes(text.text),
            token_ids_T=token_ids_T,
            logprobs_T=logprobs_T if sampling.logprobs else None,
            finish_reason=finish,
            seed=seed,
            num_prompt_tokens=len(prompt.token_ids),
        )
        return self._with_calls(answer) if prompt.has_tools else answer

    def _with_calls(self, answer: Answer) -> Answer:
        """Return the answer with the calls of tools that are in it; their ids are hashes of the answer's seed."""
        num_bytes = len(answer.text) if answer.finish_reason == "stop_string" else None
        read = self.chat.read_calls(answer.token_ids_T.tolist(), num_bytes)
        calls = tuple(replace(call, id=_call_id(answer.seed, number)) for number, call in enumerate(read.calls))
        return replace(answer, tool_calls=calls, content=read.words.encode(), tool_problem=read.problem)

    async def _ask_engine(
        self, prompt: EncodedPrompt, how: TokenSampling, text: _AnswerText
    ) -> tuple[list[int], list[float]]:
        """Return ids and log-probabilities of an answer, after waiting for room for the prompt and all new tokens."""
        scorer, metrics = self._scorer, self._scorer.metrics
        ids: list[int] = []
        logprobs: list[float] = []
        arrived = time.perf_counter()
        async with scorer.admission.hold(len(prompt.token_ids) + how.max_new_tokens):
            if scorer.problem is not None:
                raise UnavailableError(scorer.problem)
            entered = time.perf_counter()
            scorer.report_state()
            async with aclosing(scorer.engine.generate(prompt.token_ids, how)) as sampled:
                async for tokens in sampled:
                    for token_id, logprob in zip(tokens.token_ids, tokens.logprobs, strict=True):
                        ids.append(token_id)
                        logprobs.append(logprob)
                        if text.add(token_id):
                            break
                    if text.stopped:
                        break
        metrics.queue_seconds.inc(entered - arrived)
        metrics.engine_seconds.inc(time.perf_counter() - entered)
        metrics.answers_generated.inc()
        metrics.tokens_generated.inc(len(ids))
        scorer.report_state()
        return ids, logprobs


def _call_id(seed: int, number: int) -> str:
    return hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:9]


class _AnswerText:
    """The bytes of an answer as it grows, cut in front of the first stop string that it contains."""

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str]) -> None:
        self.text = bytearray()
        self.stopped = False
        self._token_bytes = token_bytes
        self._stops = [stop.encode() for stop in stops]
        self._longest = max(map(len, self._stops), default=0)

    def add(self, token_id: int) -> bool:
        """Add a token; return whether a stop string is now complete."""
        start = max(0, len(self.text) - self._longest + 1)
        self.text += self._token_bytes(token_id)
        places = [place for stop in self._stops if (place := self.text.find(stop, start)) >= 0]
        if places:
            self.stopped = True
            del self.text[min(places) :]
        return self.stopped
