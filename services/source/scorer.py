"""Texts in, blocks out: tokenise, ask the engine within its limits, and account for all probability mass."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from fusion_core.blocks import PADDING_ID, Block
from fusion_core.vocabulary import Vocabulary
from services.base.concurrency import Coalesced, gather_or_cancel
from services.base.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.models.chat_tokenizer import ChatTokenizer, open_chat
from services.models.prompt import Prompt, encode_passages
from services.source.admission import Admission
from services.source.canary import TEXTS, BatchEffect, CanaryRecord
from services.source.config import SourceConfig
from services.source.engines.base import Engine, PromptScores
from services.source.engines.load import load_engine
from services.source.engines.memory import tokens_in_flight
from services.source.metrics import SourceMetrics
from services.wire.passage import Passage
from services.wire.plausible import implausible_scores

logger = logging.getLogger("ray.serve")

_REFUSED_IN_A_ROW = 8
"""Number of different texts without an answer, one right after the other, that make a model count as broken."""


class Scorer:
    """A source model ready to score. Use `Scorer.load` on the event loop that will call `score`.

    Attributes:
        problem: why nothing more is served: the model was found broken. None as long as it is sound.
        record: the first run of the canary texts, which later ones are compared with; None compares with nothing.
        chat: how conversations are read; None where the source takes documents alone.
    """

    def __init__(
        self,
        config: SourceConfig,
        engine: Engine,
        vocabulary: Vocabulary,
        bos_id: int,
        max_tokens_in_flight: int,
        chat: ChatTokenizer | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.vocabulary = vocabulary
        self.chat = chat
        self.bos_id = bos_id
        self.problem: str | None = None
        self.record: CanaryRecord | None = None
        self._batch_effect = BatchEffect()
        self._refused: set[int] = set()
        self._canary_now = Coalesced(self.check_canary)
        self.metrics = SourceMetrics(config.name)
        self.admission = Admission(max_tokens_in_flight)

    @classmethod
    async def load(cls, config: SourceConfig, folder: Path) -> Scorer:
        """Load tokenizer and engine; raises ValueError naming the key that does not fit the model."""
        chat = open_chat(folder, config.chat_template, config.eos_token)
        vocabulary = chat.vocabulary if chat else Vocabulary.from_pretrained(folder, eos_token=config.eos_token)
        bos_id = _bos_id(config, vocabulary)
        if config.largest_top_k > vocabulary.size:
            raise ValueError(f"top_k: {config.largest_top_k} is more than the vocabulary's {vocabulary.size} tokens")
        bound = tokens_in_flight(config, folder)
        return cls(config, await load_engine(config, folder, vocabulary.size), vocabulary, bos_id, bound, chat)

    @property
    def bos_token(self) -> str:
        """The name of the special token in front of every text."""
        return self._name(self.bos_id)

    @property
    def eos_token(self) -> str:
        """The name of the special token that the end row is for; empty when the tokenizer has none."""
        return self._name(self.vocabulary.eos_id)

    def check_vocabulary(self, expected: str) -> None:
        """Raise FailedPreconditionError unless a client expects this vocabulary, or none."""
        if expected not in {"", self.vocabulary.fingerprint}:
            raise FailedPreconditionError(
                f"expected_vocabulary: {expected} was asked for, but source {self.config.name} "
                f"has {self.vocabulary.fingerprint}"
            )

    def check_top_k(self, top_k: int | None) -> int:
        """Return the number of candidates to answer with; raises InvalidArgumentError when it is outside the limits."""
        if top_k is None:
            return self.config.top_k
        if not 1 <= top_k <= self.config.largest_top_k:
            raise InvalidArgumentError(f"top_k: must be 1 to {self.config.largest_top_k}, got {top_k}")
        return top_k

    def encode(self, passages: Sequence[Passage]) -> list[Prompt]:
        """Tokenise passages; raises InvalidArgumentError naming the one that is too long."""
        prompts = encode_passages(self.vocabulary, passages, self.chat)
        for index, prompt in enumerate(prompts):
            num_tokens = prompt.num_tokens
            if not 1 <= num_tokens <= self.config.max_tokens:
                parts = " with context and EOS" if prompt.context_ids.size or prompt.encoding.ends_document else ""
                raise InvalidArgumentError(
                    f"texts[{index}]: {num_tokens} tokens{parts}; source {self.config.name} accepts "
                    f"1 to {self.config.max_tokens}"
                )
        return prompts

    async def score(self, prompt: Prompt, top_k: int) -> Block:
        """Return the block of one encoded passage, after waiting while too many tokens are in flight.

        Raises InvalidArgumentError when the model has no plausible answer to this text, UnavailableError once it is
        known to be broken.
        """
        first_id = self.bos_id if prompt.first_id is None else prompt.first_id
        ids = [first_id, *prompt.context_ids.tolist(), *prompt.encoding.token_ids_T.tolist()]
        scores = await self._ask_engine(ids, top_k)
        if (found := self._implausible(scores)) is not None:
            await self.judge(ids, found)
        if self.problem is not None:
            raise UnavailableError(self.problem)
        self._refused.clear()
        return to_block(prompt, scores, self.vocabulary)

    def _name(self, special_id: int | None) -> str:
        names = self.vocabulary.special_tokens
        return next((name for name, token_id in names.items() if token_id == special_id), "")

    async def start_canary(self) -> None:
        """Check the canary for the first time, and measure the effect of batches: see `determinism`.

        A finding becomes this scorer's `problem`. Raises UnavailableError when the engine cannot be asked.
        """
        alone = await self._scores_alone()
        if alone is not None and self.engine.shares_batches:
            together = await gather_or_cancel(*(self._ask_engine(*asked) for asked in self._canary()))
            if (found := next(filter(None, map(self._implausible, together)), None)) is not None:
                self._break(f"texts in one batch: {found}")
                return
            self._batch_effect = effect = BatchEffect.between(alone, together)
            if effect.mean_nats > (tolerance := self.config.canary.tolerance_nats):
                self._break(
                    f"the canary texts score {effect.mean_nats:.3f} nats per token apart alone and together, and "
                    f"canary.tolerance_nats is {tolerance:g}"
                )
                return
        self._compare(alone)

    @property
    def determinism(self) -> str:
        """A sentence on what may differ when a text is scored again, with the figure measured at the start."""
        measured = f"; {self._batch_effect}" if self.engine.shares_batches else ""
        return self.engine.determinism + measured

    async def check_canary(self) -> None:
        """Score the canary texts; a finding becomes this scorer's `problem`.

        Raises UnavailableError when the engine cannot be asked.
        """
        self._compare(await self._scores_alone())

    async def _scores_alone(self) -> list[PromptScores] | None:
        """Return the scores of the canary texts, asked for one after the other; None for a model found broken."""
        alone = []
        for ids, top_k in self._canary():
            scores = await self._ask_engine(ids, top_k)
            if (found := self._implausible(scores)) is not None:
                self._break(found)
                return None
            alone.append(scores)
        return alone

    def _compare(self, alone: list[PromptScores] | None) -> None:
        """Compare the canary's scores with the record, as far as batches do not explain the difference."""
        if alone is None:
            return
        drift = self.record.drift(np.concatenate([one.gold_T for one in alone])) if self.record is not None else 0.0
        if drift > self.config.canary.tolerance_nats + self._batch_effect.mean_nats:
            self._break(f"the canary texts score {drift:.3f} nats per token off their first run on these weights")
        self.report_state()

    def _canary(self) -> list[tuple[list[int], int]]:
        """Return prompt and number of candidates of every canary text."""
        top_k, most = min(8, self.config.largest_top_k), self.config.max_tokens
        encodings = self.vocabulary.encode_batch(TEXTS)
        return [([self.bos_id, *encoding.token_ids_T[:most].tolist()], top_k) for encoding in encodings]

    async def _ask_engine(self, prompt: list[int], top_k: int) -> PromptScores:
        """Return the engine's answer within its limits; raises UnavailableError for a model known to be broken."""
        arrived = time.perf_counter()
        async with self.admission.hold(len(prompt)):
            if self.problem is not None:
                raise UnavailableError(self.problem)
            entered = time.perf_counter()
            self.metrics.tokens_in_flight.set(self.admission.tokens_in_flight)
            scores = await self.engine.score(prompt, top_k)
        self.metrics.queue_seconds.inc(entered - arrived)
        self.metrics.engine_seconds.inc(time.perf_counter() - entered)
        self.metrics.texts_scored.inc()
        self.metrics.tokens_in_flight.set(self.admission.tokens_in_flight)
        return scores

    def _implausible(self, scores: PromptScores) -> str | None:
        """Return why these scores cannot go out; None when they can."""
        size = self.vocabulary.size
        if (found := implausible_scores(scores.gold_T, scores.topk_logprobs_TK, vocabulary_size=size)) is not None:
            return found
        beyond_T = scores.topk_ids_TK[:, 0] >= size
        if beyond_T.any() and (scores.topk_ids_TK[beyond_T].min(axis=1) >= size).any():
            return "all candidates of a row are beyond the tokenizer's ids"
        return None

    async def judge(self, prompt: list[int], found: str) -> NoReturn:
        """Raise InvalidArgumentError for a text that the model cannot answer, UnavailableError for a broken model."""
        await self._canary_now.get()
        if self.problem is None:
            self._refused.add(hash(tuple(prompt)))
            self.metrics.texts_refused.inc()
            logger.warning("source %s refuses a text, its canary being sound: %s", self.config.name, found)
            if len(self._refused) < _REFUSED_IN_A_ROW:
                raise InvalidArgumentError(f"the model has no answer to this text: {found}")
            self._break(f"{_REFUSED_IN_A_ROW} different texts in a row have no answer: {found}")
        raise UnavailableError(self.problem)

    def close(self) -> None:
        """End the engine; later calls fail as on a replica that is being stopped."""
        self.problem = "draining: this replica is being stopped"
        self.engine.close()

    def report_state(self) -> None:
        """Set the gauges again: Ray exports one only for a while after it was set."""
        self.metrics.canary_ok.set(self.problem is None)
        self.metrics.tokens_in_flight.set(self.admission.tokens_in_flight)

    def _break(self, problem: str) -> None:
        self.problem = f"source {self.config.name} serves nothing more: {problem}"
        self.metrics.canary_ok.set(0)


def to_block(prompt: Prompt, scores: PromptScores, vocabulary: Vocabulary) -> Block:
    """Return the engine's scores as a block; the rows of the context are left out.

    Candidates beyond the tokenizer's ids (a padded lm_head) are dropped; their mass goes to the tail, as all mass
    outside the candidates does.
    """
    first, encoding = prompt.context_ids.size, prompt.encoding
    ids_TK, logprobs_TK = scores.topk_ids_TK[first:], scores.topk_logprobs_TK[first:]
    if (beyond_TK := ids_TK >= vocabulary.size).any():
        ids_TK = np.where(beyond_TK, np.int32(PADDING_ID), ids_TK)
        logprobs_TK = np.where(beyond_TK, np.float32(-np.inf), logprobs_TK)
    inside_T = np.exp(logprobs_TK).sum(axis=1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.clip(1.0 - inside_T, 0.0, 1.0)).astype(np.float32)
    return Block(
        text_bytes=prompt.text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=tail_T,
        gold_T=scores.gold_T[first:],
        vocabulary=vocabulary.fingerprint,
        mask_T=encoding.lossless_T,
        covered_mass=float(inside_T.mean()),
        ends_document=encoding.ends_document,
    )


def _bos_id(config: SourceConfig, vocabulary: Vocabulary) -> int:
    if config.bos_token is not None:
        if config.bos_token not in vocabulary.special_tokens:
            known = ", ".join(vocabulary.special_tokens)
            raise ValueError(f"bos_token: {config.bos_token!r} is no special token of {config.model}; it has {known}")
        return vocabulary.special_tokens[config.bos_token]
    for role_id in (vocabulary.bos_id, vocabulary.eos_id):
        if role_id is not None:
            return role_id
    raise ValueError(
        f"bos_token: the tokenizer of {config.model} has neither BOS nor EOS; name the token to start with"
    )
