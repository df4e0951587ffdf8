"""Strategy `online` is a code: it spends one unit of probability on all texts, and no row knows what comes later."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.alignment.byte.projection import ByteProjection
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig, fuse
from fusion_core.fusion.attribution import attribute
from fusion_core.vocabulary import Encoding, Vocabulary
from tests.fakes.tokenizers import vocabulary

NUM_TOKENS = 6
ONLINE: list[dict[str, Any]] = [
    {},
    {"rate": 0.5, "prior": {"a": 0.7, "b": 0.2, "c": 0.1}},
    {"rate": 0.9, "min_weight": 0.2},
    {"rate": 0.3, "soften": 0.8},
]


def rows_of(source: int, text: tuple[int, ...], *, gaps: bool) -> ProjectedRows:
    """Rows of a model over two tokens whose probabilities, and gaps, depend on the tokens before a row only."""
    drawn = [np.random.default_rng([source, t, *text[:t]]) for t in range(len(text))]
    first_T = np.array([rng.beta(0.5, 0.5) for rng in drawn])
    mask_T = np.array([not gaps or rng.random() > 0.3 for rng in drawn])
    probs_TM = np.where(mask_T[:, None], np.stack([first_T, 1 - first_T], axis=1), 0.0).astype(np.float32)
    gold_T = np.log([first if token == 0 else 1 - first for first, token in zip(first_T, text, strict=True)])
    ids_TM = np.where(mask_T[:, None], [0, 1], -1).astype(np.int32)
    tail_T = (~mask_T).astype(np.float32)
    return ProjectedRows(ids_TM, probs_TM, tail_T, gold_T.astype(np.float32), mask_T, mask_T.astype(np.float32))


def fused_text(text: tuple[int, ...], config: FusionConfig, *, gaps: bool) -> Block:
    ends_T = np.arange(1, len(text) + 1, dtype=np.int32)
    encoding = Encoding(np.array(text, dtype=np.int32), ends_T, np.ones(len(text), dtype=np.bool_))
    # The last source has every row, so that no row is masked.
    sources = {name: rows_of(n, text, gaps=gaps and n < 2) for n, name in enumerate("abc")}
    block = fuse(b"x" * len(text), encoding, sources, config, "target")
    block.validate()
    return block


def mass_of_all_texts(config: FusionConfig, *, gaps: bool) -> float:
    texts = itertools.product((0, 1), repeat=NUM_TOKENS)
    return sum(math.exp(float(fused_text(text, config, gaps=gaps).gold_T.sum())) for text in texts)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("values", ONLINE)
def test_all_texts_together_have_probability_one(values: dict[str, Any], gaps: bool) -> None:
    config = FusionConfig.model_validate({"strategy": "online", **values})
    assert mass_of_all_texts(config, gaps=gaps) == pytest.approx(1.0, abs=1e-4)


def test_weights_by_the_window_s_own_loss_are_no_code() -> None:
    assert mass_of_all_texts(FusionConfig(tau=0.05), gaps=False) > 1.2


def test_weights_go_to_the_source_that_tells_the_text_and_stay_above_the_floor() -> None:
    good, bad = np.full(200, np.log(0.9), np.float32), np.full(200, np.log(0.3), np.float32)
    encoding = Encoding(np.zeros(200, np.int32), np.arange(1, 201, dtype=np.int32), np.ones(200, np.bool_))
    ids_TM, every = np.tile(np.array([0, 1], np.int32), (200, 1)), np.ones(200, np.bool_)

    def rows(gold_T: np.ndarray) -> ProjectedRows:
        probs_TM = np.stack([np.exp(gold_T), 1 - np.exp(gold_T)], axis=1).astype(np.float32)
        return ProjectedRows(ids_TM, probs_TM, np.zeros(200, np.float32), gold_T, every, np.ones(200, np.float32))

    for least in (0.0, 0.1):
        config = FusionConfig(strategy="online", prior={"good": 1.0, "bad": 9.0}, min_weight=least)
        block = fuse(b"x" * 200, encoding, {"good": rows(good), "bad": rows(bad)}, config, "target")
        share_T = (np.exp(block.gold_T.astype(np.float64)) - 0.3) / 0.6
        assert share_T[0] == pytest.approx(least + (1 - 2 * least) * 0.1, abs=1e-5)
        assert np.all(np.diff(share_T) > -1e-6) and share_T[-1] == pytest.approx(1 - least, abs=0.01)


def block_of(name: str, source: Vocabulary, text: bytes) -> Block:
    """A source's block whose rows depend on the bytes before them only, but for the realised token's place in them."""
    encoding = source.encode(text)
    starts = [0, *encoding.byte_ends_T[:-1].tolist()]
    ids, probs = [], []
    for token, start in zip(encoding.token_ids_T.tolist(), starts, strict=True):
        rng = np.random.default_rng(list(name.encode() + text[:start]))
        candidates = rng.permutation(source.size)[:8]
        ids.append(candidates if token in candidates else np.array([token, *candidates[1:]]))
        probs.append(-np.sort(-rng.dirichlet(np.ones(9))[:8]))
    ids_TK, probs_TK = np.stack(ids).astype(np.int32), np.stack(probs)
    places_T = (ids_TK == encoding.token_ids_T[:, None]).argmax(axis=1)
    return Block(
        text_bytes=text,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=np.log(probs_TK).astype(np.float32),
        tail_T=np.log1p(-probs_TK.sum(axis=1)).astype(np.float32),
        gold_T=np.log(probs_TK[np.arange(len(ids_TK)), places_T]).astype(np.float32),
        vocabulary=source.fingerprint,
        mask_T=encoding.lossless_T,
    )


TARGET = vocabulary("llama3")
SOURCES = {name: vocabulary(name) for name in ("byte_level", "gemma")}
PROJECTIONS = {name: ByteProjection(source, TARGET) for name, source in SOURCES.items()}
WORDS = st.lists(st.sampled_from(["the", "cat", "144", "Würde", "日本語", "def", "🎉", "sat,"]), min_size=1, max_size=6)


def fused_bytes(text: bytes, config: FusionConfig) -> tuple[Block, np.ndarray, list[int]]:
    """The fused block, the sources' weights in its rows, and the places at which tokens of all vocabularies end."""
    encoding = TARGET.encode(text)
    blocks: dict[str, Block | None] = {name: block_of(name, source, text) for name, source in SOURCES.items()}
    rows: dict[str, ProjectedRows | None] = {}
    ends = set(encoding.byte_ends_T.tolist())
    for name, block in blocks.items():
        assert block is not None
        rows[name] = PROJECTIONS[name].project(block, encoding)
        ends &= set(block.byte_ends_T.tolist())
    block = fuse(text, encoding, rows, config, TARGET.fingerprint)
    return block, attribute(blocks, rows, encoding, block, config).weight_ST, sorted(ends)


@settings(max_examples=40, deadline=None)
@given(WORDS, WORDS, WORDS, st.sampled_from(ONLINE[:1] + ONLINE[2:]))
def test_bytes_behind_a_place_change_no_row_before_it(
    kept: list[str], one: list[str], other: list[str], values: dict[str, Any]
) -> None:
    config = FusionConfig.model_validate({"strategy": "online", **values})
    before = " ".join(kept).encode()
    first, weight_ST, ends = fused_bytes(before + b" " + " ".join(one).encode(), config)
    second, changed_ST, also = fused_bytes(before + b" " + " ".join(other).encode(), config)
    place = max((end for end in set(ends) & set(also) if end <= len(before)), default=0)
    count = int(np.searchsorted(first.byte_ends_T, place, side="right"))
    assert np.array_equal(first.token_ids_T[:count], second.token_ids_T[:count])
    assert np.allclose(weight_ST[:, :count], changed_ST[:, :count], atol=1e-12)
    assert np.array_equal(first.topk_ids_TK[:count], second.topk_ids_TK[:count])
    for column in ("topk_logprobs_TK", "tail_T", "gold_T", "mask_T"):
        assert np.array_equal(getattr(first, column)[:count], getattr(second, column)[:count]), column


@pytest.mark.parametrize("values", ONLINE)
def test_a_source_whose_first_row_comes_later_changes_no_row_before_it(values: dict[str, Any]) -> None:
    config = FusionConfig.model_validate({"strategy": "online", **values})
    text = (0, 1, 0, 1, 1, 0)
    encoding = Encoding(np.array(text, np.int32), np.arange(1, 7, dtype=np.int32), np.ones(6, np.bool_))

    def gold(rows_of_c: ProjectedRows) -> np.ndarray:
        sources = {"a": rows_of(0, text, gaps=False), "b": rows_of(1, text, gaps=False), "c": rows_of_c}
        return fuse(b"x" * 6, encoding, sources, config, "target").gold_T

    whole = rows_of(2, text, gaps=False)
    never, late = (
        replace(whole, mask_T=has_T, ids_TM=np.where(has_T[:, None], whole.ids_TM, np.int32(-1)),
                probs_TM=whole.probs_TM * has_T[:, None], tail_T=(~has_T).astype(np.float32))
        for has_T in (np.arange(6) >= 6, np.arange(6) >= 4)
    )  # fmt: skip
    assert np.allclose(gold(never)[:4], gold(late)[:4], atol=1e-6)
    assert not np.allclose(gold(never)[4:], gold(late)[4:], atol=1e-3)


def test_the_window_s_own_loss_does_change_rows_before() -> None:
    one, weight_ST, _ = fused_bytes(b"the cat sat, 144", FusionConfig())
    other, changed_ST, _ = fused_bytes(b"the cat sat, the", FusionConfig())
    assert one.token_ids_T[0] == other.token_ids_T[0]
    assert not np.allclose(weight_ST[:, 0], changed_ST[:, 0], atol=1e-3)


@pytest.mark.parametrize("k_out", [3, 64])
def test_softened_rows_are_powers_of_the_rows_and_keep_their_order(k_out: int) -> None:
    text = "The cat sat on the mat, 144. 日本語".encode()
    plain, _, _ = fused_bytes(text, FusionConfig(k_out=k_out))
    soft, _, _ = fused_bytes(text, FusionConfig(k_out=k_out, soften=0.6))
    soft.validate()
    assert np.array_equal(plain.topk_ids_TK, soft.topk_ids_TK) and plain.mask_T.any()
    for t in np.flatnonzero(plain.mask_T):
        outcomes = [float(x) for x in [*plain.topk_logprobs_TK[t], plain.tail_T[t]] if x > -math.inf]
        scale = sum(math.exp(x) ** 0.6 for x in outcomes)
        expected = [math.exp(x) ** 0.6 / scale for x in outcomes]
        found = [math.exp(x) for x in [*soft.topk_logprobs_TK[t], soft.tail_T[t]] if x > -math.inf]
        assert found == pytest.approx(expected, rel=1e-4) and sum(found) == pytest.approx(1.0, abs=1e-5)
        assert math.exp(soft.gold_T[t]) == pytest.approx(math.exp(plain.gold_T[t]) ** 0.6 / scale, rel=1e-4)
    masked_T = ~plain.mask_T
    assert np.array_equal(plain.gold_T[masked_T], soft.gold_T[masked_T])


def test_a_prior_or_a_floor_that_does_not_fit_the_sources_is_named() -> None:
    with pytest.raises(ValueError, match="prior: none for source 'b', there are \\['a'\\]"):
        fused_text((0, 1), FusionConfig(strategy="online", prior={"a": 1.0}), gaps=False)
    for strategy in ("online", "avg_ce"):
        config = FusionConfig.model_validate({"strategy": strategy, "min_weight": 0.4})
        with pytest.raises(ValueError, match=r"min_weight: 0\.4 for each of 3 sources is more than 1"):
            fused_text((0, 1), config, gaps=False)
