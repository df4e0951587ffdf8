"""`min_edit` against the paper's formulas in plain Python, and the gates that a projection must pass."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.min_edit import MinEditConfig, MinEditProjection
from fusion_core.alignment.published.token_pairs import TokenPairs
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from fusion_core.fusion import FusionConfig, fuse
from tests.fakes.strategies import random_block, texts
from tests.fakes.tokenizers import FAMILIES, vocabulary
from tests.fusion_core.alignment.published.papers import carried, mapped_row, pair_tokens, pieces_without_spaces, warp

pairs = st.sampled_from([(a, b) for a in FAMILIES for b in ("byte_level", "gemma", "unigram_prefix", "unigram_nfkc")])
seeds = st.integers(0, 2**32 - 1)
SMALL = 300
"""Size of the target's vocabulary: smaller than the source's, so that many pieces have no exact match."""


@cache
def mapping(source: str, target: str, strategy: str) -> VocabularyMap:
    config = VocabularyMapConfig(strategy=strategy, cache_dir=None)
    return VocabularyMap.load_or_build(vocabulary(source), vocabulary(target, SMALL), config)


@cache
def projection(source: str, target: str, strategy: str, config: MinEditConfig) -> MinEditProjection:
    return MinEditProjection(
        vocabulary(source), vocabulary(target, SMALL), config, vocabulary_map=mapping(source, target, strategy)
    )


def entries(rows: ProjectedRows, t: int) -> dict[int, float]:
    ids, probs = rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist()
    present = {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}
    assert len(present) == sum(i >= 0 for i in ids), "an id appears twice in a row"
    return present


def assert_row(rows: ProjectedRows, t: int, expected: dict[int, float], tail: float) -> None:
    row = entries(rows, t)
    assert row.keys() == expected.keys()
    assert all(math.isclose(row[i], p, rel_tol=1e-4, abs_tol=1e-7) for i, p in expected.items())
    assert math.isclose(float(rows.tail_T[t]), tail, rel_tol=1e-4, abs_tol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    pairs,
    st.lists(st.integers(0, 639), min_size=1, max_size=40),
    st.lists(st.integers(0, 299), min_size=1, max_size=40),
)
def test_path_equals_the_reference(names: tuple[str, str], left: list[int], right: list[int]) -> None:
    source, target = vocabulary(names[0]), vocabulary(names[1], SMALL)
    aligned = TokenPairs(source, target, mapping(*names, "exact"), "hard")
    left, right = [i % source.size for i in left], [i % target.size for i in right]
    path = aligned.path(np.array(left, np.int32), np.array(right, np.int32))
    expected = warp(pieces_without_spaces(source, left), pieces_without_spaces(target, right))
    assert [tuple(step) for step in path.tolist()] == expected


@settings(deadline=None, max_examples=150)
@given(
    pairs,
    texts(),
    st.sampled_from(["hard", "soft"]),
    st.sampled_from(["exact", "min_edit"]),
    st.sampled_from([None, 1, 3, 8]),
    st.booleans(),
    seeds,
)
def test_projection_equals_the_formulas(
    names: tuple[str, str], text: bytes, match: str, strategy: str, window: int | None, carry: bool, seed: int
) -> None:
    source, target = vocabulary(names[0]), vocabulary(names[1], SMALL)
    block, encoding = random_block(source, text, seed, k=7), target.encode(text)
    if not block.num_tokens and text:
        return  # a text of which the tokenizer keeps nothing: no source sends such a block
    config = MinEditConfig(match=match, window_tokens=window, carry_realised=carry)
    rows = projection(*names, strategy, config).project(block, encoding)
    mapped = mapping(*names, strategy).target_ids_V.tolist()
    paired = pair_tokens(source, target, block, encoding, mapped, match, window)
    for t, s in enumerate(paired):
        usable = s is not None and bool(encoding.lossless_T[t]) and bool(block.mask_T[s])
        assert bool(rows.mask_T[t]) == usable
        if not usable or s is None:
            assert entries(rows, t) == {} and rows.tail_T[t] == 1
            continue
        expected, tail = mapped_row(block, s, mapped)
        assert math.isclose(float(rows.covered_T[t]), 1 - tail, abs_tol=1e-5)
        realised = int(encoding.token_ids_T[t])
        if carry:
            expected, tail = carried(expected, tail, realised, float(block.gold_T[s]))
        assert_row(rows, t, {realised: 0.0} | expected, tail)
        gold = math.log(expected[realised]) if expected.get(realised) else -1e4
        assert math.isclose(float(rows.gold_T[t]), gold, rel_tol=1e-4, abs_tol=1e-5)
    sums = rows.probs_TM.sum(axis=1) + rows.tail_T
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(pairs, texts(), st.sampled_from(["hard", "soft"]), seeds)
def test_published_fallback(names: tuple[str, str], text: bytes, match: str, seed: int) -> None:
    """The reference's row i predicts token i + 1, but is matched by, or falls back to, token i."""
    source, target = vocabulary(names[0]), vocabulary(names[1], SMALL)
    block, encoding = random_block(source, text, seed, k=7), target.encode(text)
    if not block.num_tokens and text:
        return
    rows = projection(*names, "min_edit", MinEditConfig(match=match, published_fallback=True)).project(block, encoding)
    mapped = mapping(*names, "min_edit").target_ids_V.tolist()
    paired = pair_tokens(source, target, block, encoding, mapped, match, shared=True)
    for t in range(encoding.num_tokens):
        assert bool(rows.mask_T[t]) == (t > 0 and bool(encoding.lossless_T[t]))
        if not rows.mask_T[t]:
            continue
        context = paired[t - 1]
        if context is not None and context + 1 < block.num_tokens:
            expected, tail = mapped_row(block, context + 1, mapped)
        else:
            expected, tail = {int(encoding.token_ids_T[t - 1]): 1.0}, 0.0
        assert_row(rows, t, {int(encoding.token_ids_T[t]): 0.0} | expected, tail)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FAMILIES), texts(), st.sampled_from(["hard", "soft"]), seeds)
def test_same_vocabulary_gives_the_same_rows(name: str, text: bytes, match: str, seed: int) -> None:
    same = vocabulary(name)
    block, encoding = random_block(same, text, seed, k=7), same.encode(text)
    if not block.num_tokens and text:
        return
    itself = VocabularyMap.build(same, same, VocabularyMapConfig(cache_dir=None))
    rows = MinEditProjection(same, same, MinEditConfig(match=match, carry_realised=False), itself).project(
        block, encoding
    )
    np.testing.assert_array_equal(rows.mask_T, encoding.lossless_T)
    for t in np.flatnonzero(rows.mask_T):
        expected = dict(zip(block.topk_ids_TK[t].tolist(), np.exp(block.topk_logprobs_TK[t]).tolist(), strict=True))
        assert_row(rows, int(t), {int(encoding.token_ids_T[t]): 0.0} | expected, math.exp(float(block.tail_T[t])))


@settings(deadline=None, max_examples=60)
@given(st.permutations(["byte_level", "gemma", "unigram"]), texts(lossless=True), seeds)
def test_the_loss_of_the_window_is_the_source_s_own(names: list[str], text: bytes, seed: int) -> None:
    """Realised tokens carry the source's own loss, masked rows the loss of the source tokens that start in them."""
    block, encoding = random_block(vocabulary(names[0]), text, seed, k=7), vocabulary(names[1], SMALL).encode(text)
    aligned = projection(names[0], names[1], "exact", MinEditConfig(match="hard"))
    rows = aligned.project(block, encoding)
    source_of_T = aligned.pairs.source_of(block, encoding)
    paired = np.flatnonzero(source_of_T >= 0)
    # Dynamic time warping may pair equal pieces that stand elsewhere in the text; then the sum has no meaning.
    if np.array_equal(block.byte_ends_T[source_of_T[paired]], encoding.byte_ends_T[paired]):
        np.testing.assert_array_equal(np.flatnonzero(rows.mask_T), paired)
        loss = rows.gold_T.sum(dtype=np.float64)
        assert loss == pytest.approx(block.gold_T.sum(dtype=np.float64), rel=1e-4, abs=1e-3)


def test_candidates_that_meet_are_added_and_the_rest_joins_the_tail() -> None:
    source, target = vocabulary("byte_level"), vocabulary("gemma", SMALL)
    text = b"."
    block, encoding = random_block(source, text, 1, k=3), target.encode(text)
    realised = int(block.token_ids_T[0])
    to = int(encoding.token_ids_T[0])
    mapped = np.full(source.size, -1, np.int32)
    others = [i for i in range(300, 310) if i != realised][:2]
    mapped[[realised, others[0]]] = to
    topk = np.tile(np.array([realised, *others], np.int32), (block.num_tokens, 1))
    logprobs = np.log(np.tile(np.array([0.5, 0.25, 0.125], np.float32), (block.num_tokens, 1)))
    block = replace(
        block, topk_ids_TK=topk, topk_logprobs_TK=logprobs, tail_T=np.full_like(block.tail_T, math.log(0.125))
    )
    aligned = MinEditProjection(
        source,
        target,
        MinEditConfig(carry_realised=False),
        VocabularyMap(mapped, source.fingerprint, target.fingerprint),
    )
    rows = aligned.project(block, encoding)
    assert rows.mask_T[0], "the map makes the two tokens agree"
    assert entries(rows, 0) == {to: pytest.approx(0.75)}, "two candidates have become one"
    assert float(rows.tail_T[0]) == pytest.approx(0.25)


def test_refuses_other_vocabularies_and_texts() -> None:
    aligned = projection("byte_level", "gemma", "exact", MinEditConfig())
    block = random_block(vocabulary("byte_level"), b"some text", 0, k=3)
    encoding = vocabulary("gemma", SMALL).encode(b"some text")
    with pytest.raises(ValueError, match="vocabulary: the block's fingerprint is x, expected"):
        aligned.project(replace(block, vocabulary="x"), encoding)
    with pytest.raises(ValueError, match="target: byte_ends must rise from 0 to the text's 9 bytes"):
        aligned.project(block, vocabulary("gemma", SMALL).encode(b"other"))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"match": "loose"}, "'hard' or 'soft'"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"window": 5}, "window"),
        ({"vocabulary_map": {"strategy": "nearest"}}, "vocabulary_map.strategy"),
        ({"published_fallback": True, "carry_realised": True}, "carry_realised: must be false with published_fallback"),
    ],
)
def test_settings_are_checked(given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MinEditConfig.model_validate(given_settings)


@pytest.mark.parametrize(
    "config", [MinEditConfig(), MinEditConfig(carry_realised=False), MinEditConfig(published_fallback=True)]
)
def test_the_rows_can_be_fused(config: MinEditConfig) -> None:
    text = b"In 1815, the other thing sat there: def add(a, b)."
    block, encoding = random_block(vocabulary("byte_level"), text, 3, k=5), vocabulary("gemma", SMALL).encode(text)
    rows = projection("byte_level", "gemma", "min_edit", config).project(block, encoding)
    fused = fuse(text, encoding, {"source": rows}, FusionConfig(), vocabulary("gemma", SMALL).fingerprint)
    fused.validate()
    assert np.array_equal(fused.mask_T, rows.mask_T)
