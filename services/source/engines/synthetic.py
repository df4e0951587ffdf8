"""Engine `synthetic`: distributions made up from the context, at a set pace; for load tests and for trying a pipeline.

Row t is a function of the two tokens before it and of the seed: it picks one of a fixed number of distributions, drawn
once when the engine is loaded. The realised token's log-probability is looked up in the whole of that distribution, so
rows are those of a (very dull) language model, and the chain rule holds.

Shape legend: T rows, K candidates, R distributions in the table.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from fusion_core.arrays import Float32, Float64, Int32, Int64
from services.source.engines.base import Engine, PromptScores, SampledTokens, TokenSampling
from services.source.engines.config import SyntheticConfig
from services.source.engines.identity import engine_name

_TABLE_ROWS = 4096
_CATCH_UP_SECONDS = 0.05
"""Longest delay of a wake-up that later texts make up for, so that the pace holds on average."""


class SyntheticEngine(Engine):
    """An engine that scores one text after the other at `tokens_per_second`; answers come `delay_seconds` later."""

    dtype = "float32"
    shares_batches = False
    determinism = "the same text scores the same, and the same seed gives the same answer, bit for bit"
    path = "arrays"

    def __init__(self, config: SyntheticConfig, vocabulary_size: int, top_k: int) -> None:
        self._config = config
        self._vocabulary_size = vocabulary_size
        self._turn = asyncio.Lock()
        self._free_at = 0.0
        rng = np.random.default_rng(config.seed)
        self._ids_RK, self._logprobs_RK, self._outside_R = _table(rng, vocabulary_size, top_k)
        self.name_and_version = engine_name("synthetic", {"seed": config.seed, "candidates": top_k}, "1")

    async def score(self, prompt_ids: Sequence[int], top_k: int) -> PromptScores:
        await self._wait(len(prompt_ids), self._config.delay_seconds)
        return self._scores(np.asarray(prompt_ids, dtype=np.int32), top_k)

    async def generate(self, prompt_ids: Sequence[int], how: TokenSampling) -> AsyncGenerator[SampledTokens, None]:
        rng = np.random.default_rng(how.seed)
        ids = list(prompt_ids)
        for number in range(how.max_new_tokens):
            await self._wait(1, self._config.delay_seconds if number == 0 else 0)
            logprobs_V = self._next_row(np.asarray(ids[-2:], dtype=np.int32))
            ids.append(_sample(logprobs_V, how, rng))
            yield SampledTokens([ids[-1]], [float(logprobs_V[ids[-1]])])
            await asyncio.sleep(0)  # a long answer keeps nobody else waiting
            if ids[-1] in how.stop_ids:
                return

    async def _wait(self, num_tokens: int, delay_seconds: float) -> None:
        """Wait as long as the engine is to take for so many tokens, and for the delay."""
        config = self._config
        if config.tokens_per_second is not None:
            async with self._turn:
                now = time.monotonic()
                self._free_at = max(self._free_at, now - _CATCH_UP_SECONDS) + num_tokens / config.tokens_per_second
                await asyncio.sleep(self._free_at - now)
        if delay_seconds:
            await asyncio.sleep(delay_seconds)

    def _next_row(self, last_ids: Int32) -> Float64:
        """Return log-probabilities of all ids behind the last one or two of a prompt."""
        row = int(_table_rows(last_ids)[-1])
        logprobs_V = np.full(self._vocabulary_size, self._outside_R[row], dtype=np.float64)
        logprobs_V[self._ids_RK[row]] = self._logprobs_RK[row]
        return logprobs_V

    def _scores(self, ids_T1: Int32, top_k: int) -> PromptScores:
        rows_T = _table_rows(ids_T1)[:-1]
        ids_TK, logprobs_TK = self._ids_RK.take(rows_T, axis=0), self._logprobs_RK.take(rows_T, axis=0)
        hits_TK = ids_TK == ids_T1[1:, None]
        place_T = hits_TK.argmax(axis=1)
        each = np.arange(len(rows_T))
        gold_T = np.where(hits_TK[each, place_T], logprobs_TK[each, place_T], self._outside_R[rows_T])
        return PromptScores(gold_T=gold_T, topk_ids_TK=ids_TK[:, :top_k], topk_logprobs_TK=logprobs_TK[:, :top_k])

    async def check_health(self) -> None:
        return None

    def close(self) -> None:
        return None


def _table_rows(ids_T: Int32) -> Int64:
    """Return for each token the row of the table that predicts the next one, by this token and the one before it."""
    context_T = ids_T.astype(np.uint32) * np.uint32(2_654_435_761)
    context_T[1:] += ids_T[:-1].astype(np.uint32) * np.uint32(2_246_822_519)
    rows_T: Int64 = ((context_T >> np.uint32(16)) % np.uint32(_TABLE_ROWS)).astype(np.int64)
    return rows_T


def _sample(logprobs_V: Float64, how: TokenSampling, rng: np.random.Generator) -> int:
    """Return the id that is sampled from a row."""
    if how.temperature == 0:
        return int(logprobs_V.argmax())
    weights_V = np.exp((logprobs_V - logprobs_V.max()) / how.temperature)
    order_V = np.argsort(-weights_V, kind="stable")
    before_V = np.cumsum(weights_V[order_V]) / weights_V.sum()
    kept = order_V[: int(np.searchsorted(before_V, how.top_p)) + 1]
    return int(rng.choice(kept, p=weights_V[kept] / weights_V[kept].sum()))


def _table(rng: np.random.Generator, vocabulary_size: int, top_k: int) -> tuple[Int32, Float32, Float32]:
    """Return for each row its candidates, their log-probabilities, and the log-probability of every other token."""
    # A candidate from each of K growing ranges of ids: all different, and mostly low ids, which are the frequent ones.
    edges: Int64 = np.geomspace(1, vocabulary_size + 1, top_k + 1).astype(np.int64) - 1
    edges = np.maximum(edges, np.arange(top_k + 1))
    drawn_RK = rng.integers(edges[:-1], edges[1:], (_TABLE_ROWS, top_k))
    ids_RK: Int32 = rng.permuted(drawn_RK, axis=1).astype(np.int32)
    steepness_R1 = rng.uniform(0.8, 2.5, (_TABLE_ROWS, 1))
    weights_RK = np.arange(1, top_k + 1, dtype=np.float64) ** -steepness_R1
    weights_RK /= weights_RK.sum(axis=1, keepdims=True)
    # No token outside the candidates may be likelier than the last of them.
    num_outside = vocabulary_size - top_k
    at_most_R = weights_RK[:, -1] * num_outside / (1 + weights_RK[:, -1] * num_outside)
    tail_R = np.minimum(rng.uniform(0.01, 0.3, _TABLE_ROWS), at_most_R)
    with np.errstate(divide="ignore"):
        outside_R = np.log(tail_R / max(1, num_outside)).astype(np.float32)
    return ids_RK, np.log(weights_RK * (1 - tail_R)[:, None]).astype(np.float32), outside_R
