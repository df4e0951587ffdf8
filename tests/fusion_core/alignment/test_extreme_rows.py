"""Rows at the edge of float32 and float64: next to impossible tokens, all mass in one place, no mass at all."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.byte.projection import ByteConfig, ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMapConfig
from fusion_core.arrays import Float32
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.strategies import random_block, texts
from tests.fakes.tokenizers import FAMILIES, LOSSLESS, vocabulary
from tests.fusion_core.alignment.byte.oracle import ExactOracle

METHODS = ("byte", "last_row", "as_mapped", "min_edit", "min_edit_as_mapped", "transport", "transport_as_mapped")
MAP = VocabularyMapConfig(cache_dir=None, strategy="exact")
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
LOWEST = float(np.finfo(np.float32).min)
SMALL = (-87.4, -103.9, -355.0, -708.5, -744.0, -745.2, -1e4, -1e30, LOWEST, -np.inf)
EXTREME = (1e-3, 0.0, -0.0, -SMALLEST, -1e-7, *SMALL)
seeds = st.integers(0, 2**32 - 1)


@cache
def projection(method: str, source: str, target: str) -> ByteProjection | MinEditProjection | TransportProjection:
    pair, carry = (vocabulary(source), vocabulary(target)), not method.endswith("as_mapped")
    if method.startswith("min_edit"):
        return MinEditProjection(*pair, MinEditConfig(vocabulary_map=MAP, carry_realised=carry))
    if method.startswith("transport"):
        return TransportProjection(*pair, TransportConfig(vocabulary_map=MAP, carry_realised=carry))
    return ByteProjection(*pair, ByteConfig(follow_tokens=method == "byte", carry_realised=carry))


def project(method: str, block: Block, target: Encoding, names: tuple[str, str], own: Block) -> ProjectedRows:
    subject = projection(method, *names)
    if isinstance(subject, TransportProjection):
        return subject.project(block, target, own)
    return subject.project(block, target)


def ending(subject: Vocabulary, text: bytes) -> Encoding:
    assert subject.eos_id is not None
    return subject.encode(text).with_end(subject.eos_id)


def extreme_block(subject: Vocabulary, text: bytes, seed: int, k: int) -> Block:
    """A block that keeps the contract: every row has its mass in one place, or evenly, and extreme values elsewhere."""
    rng = np.random.default_rng(seed)
    block = random_block(subject, text, seed, k, ends=True)
    logprobs_TK, tail_T, gold_T = block.topk_logprobs_TK.copy(), block.tail_T.copy(), block.gold_T.copy()
    for t in range(block.num_tokens):
        match rng.integers(5):
            case 0:  # all mass in the tail
                logprobs_TK[t], tail_T[t] = rng.choice(SMALL, k), 0.0
            case 1:  # all mass in one candidate
                logprobs_TK[t], tail_T[t] = rng.choice(SMALL, k), rng.choice(SMALL)
                logprobs_TK[t, 0] = rng.choice([value for value in EXTREME if value > -1e-6])
            case 2:  # evenly among the candidates
                logprobs_TK[t], tail_T[t] = -np.log(k), rng.choice(SMALL)
        if rng.random() < 0.6:
            gold_T[t] = rng.choice(EXTREME)
        logprobs_TK[t] = -np.sort(-logprobs_TK[t])
    extreme = replace(block, topk_logprobs_TK=logprobs_TK, tail_T=tail_T, gold_T=gold_T)
    extreme.validate()
    return extreme


def assert_sound(rows: ProjectedRows) -> None:
    assert np.isfinite(rows.gold_T).all() and rows.gold_T.max(initial=0.0) <= 0.0
    assert np.isfinite(rows.covered_T).all()
    assert rows.probs_TM.min(initial=0.0) >= 0.0 and rows.tail_T.min(initial=0.0) >= 0.0
    total_T = rows.probs_TM.sum(axis=1, dtype=np.float64) + rows.tail_T
    assert np.abs(total_T - 1.0).max(initial=0.0) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=100, deadline=None)
@given(text=texts(max_pieces=5), seed=seeds, k=st.sampled_from([1, 3, 16]), pair=st.permutations(FAMILIES))
def test_rows_stay_distributions(method: str, text: bytes, seed: int, k: int, pair: list[str]) -> None:
    source, target = vocabulary(pair[0]), vocabulary(pair[1])
    if not source.encode(text).num_tokens or not target.encode(text).num_tokens:
        return
    block, own = extreme_block(source, text, seed, k), extreme_block(target, text, seed + 1, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_sound(project(method, block, ending(target, text), (pair[0], pair[1]), own))


@settings(max_examples=150, deadline=None)
@given(text=texts(lossless=True), seed=seeds, k=st.sampled_from([1, 8]), pair=st.permutations(LOSSLESS))
def test_the_sum_is_the_sources_own(text: bytes, seed: int, k: int, pair: list[str]) -> None:
    source, target = vocabulary(pair[0]), vocabulary(pair[1])
    if not text or source.has_dummy_prefix:
        return
    block = extreme_block(source, text, seed, k)
    rows = project("byte", block, ending(target, text), (pair[0], pair[1]), block)
    own = np.clip(block.gold_T.astype(np.float64), -1e4, 0.0).sum()
    assert rows.gold_T.sum(dtype=np.float64) == pytest.approx(own, rel=1e-5, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    text=texts(max_pieces=3, lossless=True),
    seed=seeds,
    k=st.sampled_from([1, 4, 16]),
    pair=st.permutations(LOSSLESS),
    gold=st.sampled_from([-60.0, -355.0, -450.0]),
)
def test_equals_the_oracle_in_decimal_numbers(text: bytes, seed: int, k: int, pair: list[str], gold: float) -> None:
    source, target = vocabulary(pair[0]), vocabulary(pair[1])
    text = text.decode()[:24].encode()
    if not text or source.has_dummy_prefix:
        return
    encoding, block, rng = target.encode(text), random_block(source, text, seed, k), np.random.default_rng(seed)
    # Realised tokens that are no candidates are as improbable as the test says, and no row contradicts itself.
    realised_TK = block.topk_ids_TK == block.token_ids_T[:, None]
    topk_ids_TK = np.where(realised_TK, np.int32(-1), block.topk_ids_TK)
    logprobs_TK = np.where(realised_TK, np.float32(-np.inf), block.topk_logprobs_TK)
    with np.errstate(divide="ignore"):
        tail_T = np.log1p(-np.exp(logprobs_TK).sum(axis=1)).astype(np.float32)
    improbable_T = (rng.random(block.num_tokens) < 0.7) | (block.gold_T > tail_T)
    gold_T: Float32 = np.where(improbable_T, np.float32(gold), block.gold_T)
    block = replace(block, topk_ids_TK=topk_ids_TK, topk_logprobs_TK=logprobs_TK, tail_T=tail_T, gold_T=gold_T)
    rows = ByteProjection(source, target).project(block, encoding)
    firsts = target.first_tokens([source.token_bytes(x) for x in range(source.size)]).tolist()
    for t, expected in enumerate(ExactOracle(source, target, block, encoding).rows(firsts)):
        assert bool(rows.mask_T[t]) == (expected is not None)
        if expected is None:
            continue
        out, tail, log_gold = expected
        found = {x: p for x, p in zip(rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist(), strict=True) if x >= 0}
        for x in {*out, *found}:
            assert found.get(x, 0.0) == pytest.approx(float(out.get(x, 0.0)), rel=2e-3, abs=2e-6)
        assert rows.tail_T[t] == pytest.approx(float(tail), rel=2e-3, abs=2e-6)
        assert rows.gold_T[t] == pytest.approx(log_gold, rel=1e-4, abs=1e-3)
