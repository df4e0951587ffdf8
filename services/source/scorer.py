"""Texts in, blocks out: tokenises, asks the engine within its limits, and accounts for every bit of mass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from fusion_core.blocks import PADDING_ID, Block
from fusion_core.vocabulary import Encoding, Vocabulary
from services.common.errors import InvalidArgumentError
from services.source.config import SourceConfig
from services.source.engine import Engine, PromptScores, load_engine


class Scorer:
    """A source model ready to score. Use `Scorer.load` on the event loop that will call `score`."""

    def __init__(self, config: SourceConfig, engine: Engine, vocabulary: Vocabulary, bos_id: int) -> None:
        self.config = config
        self.engine = engine
        self.vocabulary = vocabulary
        self.bos_id = bos_id
        self._in_flight = _Budget(config.max_tokens_in_flight)

    @classmethod
    async def load(cls, config: SourceConfig, folder: Path) -> Scorer:
        vocabulary = Vocabulary.from_pretrained(folder)
        bos_id = _bos_id(config, vocabulary)
        if config.largest_top_k > vocabulary.size:
            raise ValueError(f"top_k: {config.largest_top_k} is more than the vocabulary's {vocabulary.size} tokens")
        return cls(config, await load_engine(config, folder), vocabulary, bos_id)

    @property
    def bos_token(self) -> str:
        """The special token in front of every text."""
        names = self.vocabulary.special_tokens
        return next((name for name, token_id in names.items() if token_id == self.bos_id), "")

    def check_top_k(self, top_k: int | None) -> int:
        """The number of candidates to answer with; raises InvalidArgumentError when it is outside the limits."""
        if top_k is None:
            return self.config.top_k
        if not 1 <= top_k <= self.config.largest_top_k:
            raise InvalidArgumentError(f"top_k: must be 1 to {self.config.largest_top_k}, got {top_k}")
        return top_k

    def encode(self, texts: Sequence[bytes], field: str = "texts") -> list[Encoding]:
        """Tokenises texts; raises InvalidArgumentError naming the text that is empty, too long or not UTF-8."""
        for index, text in enumerate(texts):
            if not text:
                raise InvalidArgumentError(f"{field}[{index}]: must not be empty")
            if len(text) > self.config.max_text_bytes:
                raise InvalidArgumentError(
                    f"{field}[{index}]: {len(text)} bytes; source {self.config.name} accepts "
                    f"at most {self.config.max_text_bytes}"
                )
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidArgumentError(f"{field}[{index}]: not UTF-8 at byte {error.start}") from error
        encodings = self.vocabulary.encode_batch(texts)
        for index, encoding in enumerate(encodings):
            num_tokens = len(encoding.token_ids_T)
            if not 1 <= num_tokens <= self.config.max_tokens:
                raise InvalidArgumentError(
                    f"{field}[{index}]: {num_tokens} tokens; source {self.config.name} accepts "
                    f"1 to {self.config.max_tokens}"
                )
        return encodings

    async def score(self, text: bytes, encoding: Encoding, top_k: int) -> Block:
        """Scores one encoded text, waiting its turn while too many tokens are in flight."""
        prompt = [self.bos_id, *encoding.token_ids_T.tolist()]
        async with self._in_flight.hold(len(prompt)):
            scores = await self.engine.score(prompt, top_k)
        return to_block(text, encoding, scores, self.vocabulary)


def to_block(text: bytes, encoding: Encoding, scores: PromptScores, vocabulary: Vocabulary) -> Block:
    """Puts the engine's scores into a block.

    Candidates beyond the tokenizer's ids (a padded lm_head) are dropped; their mass goes to the tail like all mass that
    is no candidate's.
    """
    beyond_TK = scores.topk_ids_TK >= vocabulary.size
    ids_TK = np.where(beyond_TK, np.int32(PADDING_ID), scores.topk_ids_TK)
    logprobs_TK = np.where(beyond_TK, np.float32(-np.inf), scores.topk_logprobs_TK)
    inside_T = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.clip(1.0 - inside_T, 0.0, 1.0)).astype(np.float32)
    return Block(
        text_bytes=text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=tail_T,
        gold_T=scores.gold_T,
        vocabulary=vocabulary.fingerprint,
        mask_T=encoding.lossless_T,
        covered_mass=float(inside_T.mean()),
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


class _Budget:
    """A first-come, first-served bound on a sum: tokens handed to the engine."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._turn = asyncio.Lock()
        self._returned = asyncio.Event()

    @asynccontextmanager
    async def hold(self, amount: int) -> AsyncIterator[None]:
        await self._acquire(amount)
        try:
            yield
        finally:
            self._free += amount
            self._returned.set()

    async def _acquire(self, amount: int) -> None:
        async with self._turn:
            while self._free < amount:
                self._returned.clear()
                await self._returned.wait()
            self._free -= amount
