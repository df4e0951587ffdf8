"""`transport` against the paper's formulas in plain Python, and its transport plans against Sinkhorn's iterations."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion_core.alignment.published.sinkhorn import largest_entries
from fusion_core.alignment.published.transport import TransportConfig, TransportProjection
from fusion_core.alignment.published.vocabulary_map import VocabularyMapConfig
from tests.fakes.strategies import random_block, texts
from tests.fakes.tokenizers import FAMILIES, vocabulary
from tests.fusion_core.alignment.published.papers import carried, pair_tokens, sinkhorn, transported_row

SMALL = 300
PAIRS = [(a, b) for a in FAMILIES for b in ("byte_level", "gemma", "unigram_prefix")]
WEIGHT = 0.25
seeds = st.integers(0, 2**32 - 1)


@cache
def projection(source: str, target: str, carry: bool) -> TransportProjection:
    config = TransportConfig(
        vocabulary_map=VocabularyMapConfig(cache_dir=None),
        entropy_weight=WEIGHT,
        top_k=4,
        threshold=1e-9,
        carry_realised=carry,
    )
    return TransportProjection(vocabulary(source), vocabulary(target, SMALL), config)


def problem(seed: int, num_n: int, num_m: int, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    costs = draw.integers(0, highest + 1, (num_n, num_m)).astype(np.uint16)
    source, target = (np.maximum(draw.dirichlet(np.full(size, 0.5)), 1e-9) for size in (num_n, num_m))
    return costs, source / source.sum(), target / target.sum()


@settings(deadline=None, max_examples=80)
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(0, 20), st.sampled_from([1.0, 0.3, 0.1, 1 / 30]))
def test_plans_equal_sinkhorn(seed: int, num_n: int, num_m: int, highest: int, weight: float) -> None:
    costs, source, target = problem(seed, num_n, num_m, highest)
    plan, converged = sinkhorn(costs.astype(float), source, target, weight, 1e-9, 2000)
    column, mass, missed = largest_entries(costs[None], source[None], target[None], weight, 1e-9, 200)
    assert missed[0] <= 1e-9
    assume(converged)
    np.testing.assert_allclose(mass[0], plan.max(axis=1), rtol=1e-4, atol=1e-7)
    for n, row in enumerate(plan):
        if len(row) == 1 or np.sort(row)[-2] < 0.999 * row.max():
            assert column[0, n] == row.argmax()


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 10), st.integers(2, 10), st.integers(0, 60))
def test_published_settings_converge(seed: int, num_n: int, num_m: int, highest: int) -> None:
    """At the published weight and threshold, where Sinkhorn's own iterations take thousands of rounds."""
    costs, source, target = problem(seed, num_n, num_m, highest)
    _, mass, missed = largest_entries(costs[None], source[None], target[None], 1 / 30, 1e-5, 200)
    assert missed[0] <= 1e-5
    assert np.all(mass[0] <= source + 1e-5)
    assert np.all(mass[0] >= source / num_m - 1e-5)


def test_candidates_without_mass_take_no_part() -> None:
    costs = np.array([[[0, 3, 1], [3, 0, 1]]], np.uint16)
    column, mass, _ = largest_entries(costs, np.array([[1.0, 0.0]]), np.array([[0.0, 0.4, 0.6]]), 0.1, 1e-9, 100)
    np.testing.assert_array_equal(column, [[2, -1]])
    np.testing.assert_allclose(mass, [[0.6, 0.0]])
    column, mass, missed = largest_entries(costs, np.zeros((1, 2)), np.zeros((1, 3)), 0.1, 1e-9, 100)
    assert column.tolist() == [[-1, -1]] and mass.tolist() == [[0, 0]] and missed.tolist() == [0]


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(PAIRS), texts(max_pieces=5), st.booleans(), seeds)
def test_projection_equals_the_formulas(names: tuple[str, str], text: bytes, carry: bool, seed: int) -> None:
    source, target = vocabulary(names[0]), vocabulary(names[1], SMALL)
    block, own, encoding = (
        random_block(source, text, seed, 6),
        random_block(target, text, seed + 1, 6),
        target.encode(text),
    )
    if text and not (block.num_tokens and own.num_tokens):
        return
    aligned = projection(*names, carry)
    rows = aligned.project(block, encoding, own)
    mapped = aligned.vocabulary_map.target_ids_V.tolist()
    for t, s in enumerate(pair_tokens(source, target, block, encoding, mapped, "soft")):
        usable = s is not None and bool(encoding.lossless_T[t]) and bool(block.mask_T[s])
        assert bool(rows.mask_T[t]) == usable
        if not usable or s is None:
            assert (rows.ids_TM[t] == -1).all() and rows.tail_T[t] == 1
            continue
        row = transported_row(
            source, block, s, target, own, t, top_k=4, weight=WEIGHT, threshold=1e-9, max_iterations=3000
        )
        if row is None:
            continue
        tail = 1 - sum(row.values())
        assert math.isclose(float(rows.covered_T[t]), 1 - tail, abs_tol=1e-4)
        realised = int(encoding.token_ids_T[t])
        row = {realised: 0.0} | row
        if carry:
            row, tail = carried(row, tail, realised, float(block.gold_T[s]))
        got = {i: p for i, p in zip(rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist(), strict=True) if i >= 0}
        assert got.keys() == row.keys()
        assert all(math.isclose(got[i], p, rel_tol=1e-3, abs_tol=1e-5) for i, p in row.items())
        assert math.isclose(float(rows.tail_T[t]), tail, rel_tol=1e-3, abs_tol=1e-4)
    np.testing.assert_allclose(rows.probs_TM.sum(axis=1) + rows.tail_T, 1, atol=1e-5)


def test_the_target_s_own_distributions_are_needed() -> None:
    aligned = projection("byte_level", "gemma", True)
    block, text = random_block(vocabulary("byte_level"), b"some text", 0, k=6), b"some text"
    encoding = vocabulary("gemma", SMALL).encode(text)
    own = random_block(vocabulary("gemma", SMALL), text, 0, k=6)
    with pytest.raises(ValueError, match="target_block: transport needs the target's own distributions"):
        aligned.project(block, encoding)
    with pytest.raises(ValueError, match="vocabulary: the block's fingerprint"):
        aligned.project(block, encoding, block)
    with pytest.raises(ValueError, match="target_block: its tokens are not those"):
        aligned.project(block, encoding, replace(own, token_ids_T=own.token_ids_T + 1))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"match": "loose"}, "'hard' or 'soft'"),
        ({"top_k": 0}, "top_k"),
        ({"entropy_weight": 0}, "entropy_weight"),
        ({"threshold": 0}, "threshold"),
        ({"epsilon": 1}, "epsilon"),
    ],
)
def test_settings_are_checked(given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransportConfig.model_validate(given_settings)
