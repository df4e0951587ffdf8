"""Fusion against an oracle in plain Python, its weights, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, TooFewSources, fuse
from tests.fakes.strategies import random_block, texts
from tests.fakes.tokenizers import vocabulary
from tests.fusion_core.fusion.weights_oracle import oracle_weights

TARGET = vocabulary("unigram_prefix")
NAMES = ("byte_level", "gemma", "metaspace", "unigram_prefix", "unigram_nfkc")
PROJECTIONS = {name: ByteProjection(vocabulary(name), TARGET) for name in NAMES}
TEXT = "The other thing is there. Die Würde 日本語 12 * 12 = 144\n\tdef add(a, b):\r\n  the end".encode()


def projected(name: str, text: bytes, seed: int, k: int = 16) -> ProjectedRows:
    return PROJECTIONS[name].project(random_block(vocabulary(name), text, seed, k), TARGET.encode(text))


def distribution(block: Block, t: int) -> dict[int, float]:
    pairs = zip(block.topk_ids_TK[t].tolist(), block.topk_logprobs_TK[t].tolist(), strict=True)
    return {x: math.exp(p) for x, p in pairs if x >= 0}


def entries(rows: ProjectedRows, t: int) -> dict[int, float]:
    return {x: p for x, p in zip(rows.ids_TM[t].tolist(), rows.probs_TM[t].tolist(), strict=True) if x >= 0}


configs = st.one_of(
    st.builds(
        FusionConfig,
        strategy=st.sampled_from(["min_ce", "avg_ce"]),
        tau=st.sampled_from([0.05, 1.0]),
        scope=st.sampled_from(["window", "span"]),
        span_tokens=st.integers(1, 7),
        k_out=st.sampled_from([1, 3, 32]),
        min_weight=st.sampled_from([0.0, 0.1]),
    ),
    st.builds(
        FusionConfig,
        strategy=st.just("online"),
        rate=st.sampled_from([0.05, 0.5]),
        k_out=st.sampled_from([3, 32]),
        min_weight=st.sampled_from([0.0, 0.1]),
    ),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True), texts(4), st.integers(0, 10**6), configs)
def test_equals_the_oracle(names: list[str], text: bytes, seed: int, config: FusionConfig) -> None:
    encoding = TARGET.encode(text)
    names = [name for name in names if vocabulary(name).encode(text).num_tokens]
    if not encoding.num_tokens or not names:
        return
    sources = {name: projected(name, text, seed + i) for i, name in enumerate(names)}
    block = fuse(text, encoding, sources, config, TARGET.fingerprint)
    block.validate()
    weights = oracle_weights(sources, encoding, config)
    for t in range(encoding.num_tokens):
        usable = {name: weights[t][name] for name, rows in sources.items() if rows.mask_T[t] and weights[t][name] > 0}
        assert bool(block.mask_T[t]) == bool(usable)
        found = distribution(block, t)
        if not usable:
            assert found == {} and block.tail_T[t] == 0.0
            continue
        expected: dict[int, float] = {}
        for name, weight in usable.items():
            for x, p in entries(sources[name], t).items():
                expected[x] = expected.get(x, 0.0) + weight / sum(usable.values()) * p
        realised = int(encoding.token_ids_T[t])
        assert found == pytest.approx({x: expected.get(x, 0.0) for x in found}, rel=1e-4, abs=1e-7)
        assert realised in found and math.exp(block.gold_T[t]) == pytest.approx(expected[realised], rel=1e-4)
        best = sorted(expected.values(), reverse=True)[: config.k_out]
        kept = sorted((p for x, p in found.items() if x != realised), reverse=True)
        assert kept == pytest.approx([p for p in best if p > 0][: len(kept)], rel=1e-4, abs=1e-7) or (
            sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-4, abs=1e-7)
        )
        assert len(found) == min(config.k_out, len(expected))
        assert sum(found.values()) + math.exp(block.tail_T[t]) == pytest.approx(1.0, abs=1e-5)
        assert np.all(np.diff(block.topk_logprobs_TK[t][: len(found)]) <= 1e-6)


def test_one_source_alone_passes_through() -> None:
    rows = projected("gemma", TEXT, 1)
    block = fuse(TEXT, TARGET.encode(TEXT), {"gemma": rows}, FusionConfig(k_out=64), TARGET.fingerprint)
    assert np.allclose(block.gold_T, rows.gold_T, atol=1e-6)
    assert block.shares[0].weight == pytest.approx(1.0)
    for t in range(block.num_tokens):
        assert distribution(block, t) == pytest.approx(entries(rows, t), rel=1e-4, abs=1e-7)


def test_the_target_itself_can_be_a_source() -> None:
    own = random_block(TARGET, TEXT, 3, 16)
    rows = PROJECTIONS["unigram_prefix"].project(own, TARGET.encode(TEXT))
    block = fuse(TEXT, TARGET.encode(TEXT), {"target": rows}, FusionConfig(k_out=17), TARGET.fingerprint)
    assert np.array_equal(block.token_ids_T, own.token_ids_T)
    assert np.allclose(block.gold_T, own.gold_T, atol=1e-5)
    assert block.nats_per_byte == pytest.approx(own.nats_per_byte, rel=1e-5)


def test_missing_sources_are_left_out_and_recorded() -> None:
    rows = {"a": projected("gemma", TEXT, 1), "lost": None, "b": projected("byte_level", TEXT, 2)}
    encoding = TARGET.encode(TEXT)
    block = fuse(TEXT, encoding, rows, FusionConfig(), TARGET.fingerprint)
    alone = fuse(TEXT, encoding, {"a": rows["a"], "b": rows["b"]}, FusionConfig(), TARGET.fingerprint)
    assert [(s.name, s.present) for s in block.shares] == [("a", True), ("lost", False), ("b", True)]
    assert block.shares[1].weight == 0.0 and math.isnan(block.shares[1].nats_per_byte)
    assert np.array_equal(block.topk_ids_TK, alone.topk_ids_TK)
    assert sum(share.weight for share in block.shares) == pytest.approx(1.0)
    with pytest.raises(TooFewSources, match=r"2 of 3 sources answered, at least 3 .*missing: lost"):
        fuse(TEXT, encoding, rows, FusionConfig(min_sources=3), TARGET.fingerprint)
    with pytest.raises(TooFewSources):
        fuse(TEXT, encoding, {"lost": None}, FusionConfig(), TARGET.fingerprint)


def test_losses_are_per_byte_over_the_bytes_that_all_sources_have() -> None:
    """A source that masks its worst rows gains nothing from it."""
    text = "the ½ other ﬁ thing".encode()  # NFKC rewrites two characters
    encoding = TARGET.encode(text)
    sources = {"whole": projected("gemma", text, 5), "lossy": projected("unigram_nfkc", text, 5)}
    common = sources["whole"].mask_T & sources["lossy"].mask_T
    assert sources["whole"].mask_T.all() and not common.all() and common.any()
    length = np.diff(encoding.byte_ends_T, prepend=0)[common].sum()
    block = fuse(text, encoding, sources, FusionConfig(), TARGET.fingerprint)
    for share, rows in zip(block.shares, sources.values(), strict=True):
        assert share.nats_per_byte == pytest.approx(-rows.gold_T[common].sum() / length, rel=1e-5)
    # Where only one source can give a row, it gives all of it.
    only = np.flatnonzero(sources["whole"].mask_T & ~sources["lossy"].mask_T)
    for t in only:
        assert math.exp(block.gold_T[t]) == pytest.approx(math.exp(sources["whole"].gold_T[t]), rel=1e-5)
    assert block.mask_T.all()


def test_fixed_weights_follow_the_configuration() -> None:
    encoding = TARGET.encode(TEXT)
    rows = {"a": projected("gemma", TEXT, 1), "b": projected("byte_level", TEXT, 2)}
    config = FusionConfig(strategy="fixed", weights={"a": 3.0, "b": 1.0, "c": 4.0})
    block = fuse(TEXT, encoding, rows, config, TARGET.fingerprint)
    assert [share.weight for share in block.shares] == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match=r"no weight for source 'z', there are \['a', 'b', 'c'\]"):
        fuse(TEXT, encoding, {"z": rows["a"]}, config, TARGET.fingerprint)
    zero = FusionConfig(strategy="fixed", weights={"a": 0.0, "b": 1.0})
    with pytest.raises(TooFewSources, match=r"weight 0 \(missing: b\)"):  # it may answer the next time
        fuse(TEXT, encoding, {"a": rows["a"], "b": None}, zero, TARGET.fingerprint)
    with pytest.raises(ValueError, match="weight 0; at least one that is asked") as hopeless:
        fuse(TEXT, encoding, {"a": rows["a"]}, zero, TARGET.fingerprint)
    assert not isinstance(hopeless.value, TooFewSources)


def test_rows_of_another_text_are_refused() -> None:
    rows = projected("gemma", b"the other thing", 1)
    with pytest.raises(ValueError, match=r"source 'a': .* rows"):
        fuse(TEXT, TARGET.encode(TEXT), {"a": rows}, FusionConfig(), TARGET.fingerprint)


def test_probabilities_too_small_for_float32_keep_their_logarithm() -> None:
    rows = projected("gemma", TEXT, 1)
    gold_T = np.full_like(rows.gold_T, -200.0)
    probs_TM = np.where(rows.ids_TM == TARGET.encode(TEXT).token_ids_T[:, None], 0.0, rows.probs_TM)
    tail_T = (1.0 - probs_TM.sum(axis=1, dtype=np.float64)).astype(np.float32)
    rare = ProjectedRows(rows.ids_TM, probs_TM.astype(np.float32), tail_T, gold_T, rows.mask_T, rows.covered_T)
    block = fuse(TEXT, TARGET.encode(TEXT), {"a": rare}, FusionConfig(), TARGET.fingerprint)
    block.validate()
    assert np.allclose(block.gold_T, -200.0)
    assert np.all((block.topk_ids_TK == block.token_ids_T[:, None]).any(axis=1))
    assert np.allclose(block.topk_logprobs_TK[block.topk_ids_TK == block.token_ids_T[:, None]], -200.0)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"strategy": "best"}, r"strategy(.|\n)*'min_ce', 'avg_ce', 'fixed' or 'online'"),
        ({"tau": 0}, r"tau(.|\n)*greater than 0"),
        ({"tau": float("inf")}, "tau"),
        ({"scope": "document"}, r"scope(.|\n)*'window' or 'span'"),
        ({"k_out": 0}, r"k_out(.|\n)*greater than or equal to 1"),
        ({"min_sources": 0}, "min_sources"),
        ({"span_tokens": 0}, "span_tokens"),
        ({"temperature": 1}, r"temperature(.|\n)*not permitted"),
        ({"strategy": "fixed"}, "weights: strategy 'fixed' needs"),
        ({"weights": {"a": 1.0}}, "weights: only allowed with strategy 'fixed'"),
        ({"strategy": "fixed", "weights": {"a": -1.0}}, "weights.a: must be"),
        ({"strategy": "fixed", "weights": {"a": 0.0}}, "weights: at least one"),
        ({"strategy": "fixed", "weights": {"a": 1.0}, "min_weight": 0.1}, "min_weight: not with strategy 'fixed'"),
        ({"prior": {"a": 1.0}}, "prior: only allowed with strategy 'online'"),
        ({"strategy": "online", "prior": {"a": 0.0}}, "prior.a: must be a number above 0"),
        ({"strategy": "online", "scope": "span"}, "scope: must be 'window' with strategy 'online'"),
        ({"strategy": "online", "rate": 1.0}, r"rate(.|\n)*less than 1"),
        ({"soften": 0.0}, r"soften(.|\n)*greater than 0"),
        ({"soften": 1.5}, r"soften(.|\n)*less than or equal to 1"),
        ({"min_weight": -0.1}, "min_weight"),
    ],
)
def test_configuration_errors_name_the_setting(settings_: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        FusionConfig.model_validate(settings_)
