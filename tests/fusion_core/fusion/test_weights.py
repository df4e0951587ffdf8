"""Weights of sources that do not have the same rows, against the slow oracle and in the cases that went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.vocabulary import Encoding
from tests.fusion_core.fusion.weights_oracle import oracle_weights


def encoding_of(lengths: Sequence[int]) -> Encoding:
    ends_T = np.cumsum(lengths, dtype=np.int32)
    return Encoding(np.zeros(len(lengths), dtype=np.int32), ends_T, np.ones(len(lengths), dtype=np.bool_))


def source(nats_T: Sequence[float], mask_T: Sequence[bool]) -> ProjectedRows:
    """Rows whose realised token, id 0, has the given loss, and id 1 all the rest; none where masked."""
    gold_T, mask = -np.asarray(nats_T, dtype=np.float32), np.asarray(mask_T, dtype=np.bool_)
    realised_T = np.exp(gold_T)
    probs_TM = np.where(mask[:, None], np.stack([realised_T, 1 - realised_T], axis=1), 0).astype(np.float32)
    ids_TM = np.where(mask[:, None], np.array([0, 1]), -1).astype(np.int32)
    tail_T = (~mask).astype(np.float32)
    return ProjectedRows(ids_TM, probs_TM, tail_T, gold_T, mask, np.ones(len(mask), dtype=np.float32))


def fused(sources: dict[str, ProjectedRows], lengths: Sequence[int], config: FusionConfig) -> Block:
    block = fuse(b"x" * sum(lengths), encoding_of(lengths), sources, config, "target")
    block.validate()
    return block


def weights_of(block: Block) -> dict[str, float]:
    return {share.name: share.weight for share in block.shares}


STRATEGIES = st.one_of(
    st.builds(
        FusionConfig,
        strategy=st.sampled_from(["min_ce", "avg_ce"]),
        tau=st.sampled_from([0.05, 1.0]),
        scope=st.sampled_from(["window", "span"]),
        span_tokens=st.integers(1, 5),
        min_weight=st.sampled_from([0.0, 0.1]),
    ),
    st.builds(
        FusionConfig,
        strategy=st.just("online"),
        rate=st.sampled_from([0.05, 0.5]),
        prior=st.sampled_from([{}, {f"s{i}": 1.0 + i for i in range(6)}]),
        min_weight=st.sampled_from([0.0, 0.1]),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.1, 0.4, 0.8, 1.0]), STRATEGIES)
def test_equals_the_oracle(seed: int, num_sources: int, num_tokens: int, masked: float, config: FusionConfig) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, num_tokens)
    sources = {
        f"s{i}": source(rng.exponential(rng.uniform(0.2, 3), num_tokens), rng.random(num_tokens) >= masked)
        for i in range(num_sources)
    }
    block = fused(sources, lengths.tolist(), config)
    expected = oracle_weights(sources, encoding_of(lengths.tolist()), config)
    for t in range(num_tokens):
        usable = {name: expected[t][name] for name in sources if sources[name].mask_T[t] and expected[t][name] > 0}
        assert bool(block.mask_T[t]) == bool(usable)
        if usable:
            mixed = sum(w * math.exp(sources[name].gold_T[t]) for name, w in usable.items()) / sum(usable.values())
            assert math.exp(block.gold_T[t]) == pytest.approx(mixed, rel=1e-4, abs=1e-30)
        everyone = sum(w * math.exp(sources[name].gold_T[t]) for name, w in expected[t].items())
        assert usable or math.exp(block.gold_T[t]) == pytest.approx(everyone, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("strategy", ["avg_ce", "min_ce"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_source_without_rows_changes_nothing_for_the_others(strategy: str, place: int) -> None:
    rng = np.random.default_rng(1)
    lengths, whole = [3] * 20, [True] * 20
    good, bad = source(rng.exponential(1.5, 20), whole), source(rng.exponential(4.5, 20), whole)
    blind = source([0.01] * 20, [False] * 20)
    others = [("good", good), ("bad", bad)]
    config = FusionConfig(strategy=strategy, tau=0.5)
    alone = fused(dict(others), lengths, config)
    block = fused(dict([*others[:place], ("blind", blind), *others[place:]]), lengths, config)
    assert np.array_equal(block.topk_ids_TK, alone.topk_ids_TK) and block.mask_T.all()
    assert np.allclose(block.gold_T, alone.gold_T, atol=1e-6)
    assert weights_of(block) == pytest.approx(weights_of(alone) | {"blind": 0.0})
    assert weights_of(block)["good"] > 0.9
    shares = {share.name: share for share in block.shares}
    assert shares["blind"].present and math.isnan(shares["blind"].nats_per_byte)
    assert shares["good"].nats_per_byte == pytest.approx(-good.gold_T.sum() / 60, rel=1e-5)


def test_a_source_without_rows_in_a_span_does_not_mask_it() -> None:
    half = [True] * 8 + [False] * 8
    better, worse = source([0.2] * 16, half), source([1.0] * 16, [True] * 16)
    config = FusionConfig(strategy="min_ce", scope="span", span_tokens=8)
    block = fused({"better": better, "worse": worse}, [2] * 16, config)
    assert block.mask_T.all()
    assert np.allclose(block.gold_T, [-0.2] * 8 + [-1.0] * 8, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_twelve_sources_without_a_common_row_are_ordered_as_on_all_rows(seed: int) -> None:
    """Every source loses a constant more than a row's own difficulty, and masks 40 % of the rows."""
    rng = np.random.default_rng(seed)
    num_tokens, num_sources = 60, 12
    lengths = rng.integers(1, 6, num_tokens)
    difficulty_T = rng.exponential(2.0, num_tokens)
    extra_S = rng.permutation(np.linspace(0.5, 1.5, num_sources))
    masks = rng.random((num_sources, num_tokens)) >= 0.4
    masks[0, masks.all(axis=0)] = False  # no row that all have
    sources = {f"s{s}": source(difficulty_T + extra_S[s] * lengths, masks[s]) for s in range(num_sources)}
    config = FusionConfig(tau=0.3)
    block = fused(sources, lengths.tolist(), config)
    nats = np.array([share.nats_per_byte for share in block.shares])
    assert np.allclose(nats - nats.min(), extra_S - extra_S.min(), atol=1e-4)
    best = fused(sources, lengths.tolist(), FusionConfig(strategy="min_ce"))
    assert max(weights_of(best), key=weights_of(best).__getitem__) == f"s{int(extra_S.argmin())}"


def test_sources_that_share_no_row_are_compared_over_all_bytes() -> None:
    first, second = [True, True, False, False], [False, False, True, True]
    one, other = source([0.5] * 4, first), source([1.5] * 4, second)
    block = fused({"one": one, "other": other}, [1] * 4, FusionConfig(strategy="min_ce"))
    assert block.mask_T.tolist() == first
    swapped = fused({"other": other, "one": one}, [1] * 4, FusionConfig(strategy="min_ce"))
    assert np.array_equal(swapped.mask_T, block.mask_T)


def test_the_order_of_sources_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    sources = {f"s{i}": source(rng.exponential(1 + i, 30), rng.random(30) > 0.4) for i in range(5)}
    block = fused(sources, [2] * 30, FusionConfig())
    backwards = fused(dict(reversed(sources.items())), [2] * 30, FusionConfig())
    assert weights_of(block) == pytest.approx(weights_of(backwards))
    assert np.allclose(block.gold_T, backwards.gold_T, atol=1e-6)


def test_when_no_source_has_a_row_all_are_masked() -> None:
    sources = {"a": source([1.0] * 3, [False] * 3), "b": source([2.0] * 3, [False] * 3)}
    for strategy in ("avg_ce", "min_ce"):
        block = fused(sources, [1] * 3, FusionConfig(strategy=strategy))
        assert not block.mask_T.any() and np.isfinite(block.gold_T).all()
        assert [share.weight for share in block.shares] == [0.0, 0.0]


def test_impossible_tokens_and_rows_without_bytes_keep_weights_finite() -> None:
    certain, impossible = source([0.0] * 3, [True] * 3), source([math.inf, 1.0, 1.0], [True] * 3)
    for lengths in ([1, 1, 1], [0, 1, 1], [0, 0, 0]):
        block = fused({"impossible": impossible, "certain": certain}, lengths, FusionConfig())
        assert sum(weights_of(block).values()) == pytest.approx(1.0)
        assert not sum(lengths) or weights_of(block)["certain"] > 0.9
