"""The best mixture against a general optimiser, its segments against texts cut by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.fusion.disagreement import disagreement, likeliest_ids, mass_outside
from fusion_core.fusion.headroom import Segments, best_mixture, common_segments, mixture_nats_per_byte
from tests.fakes.blocks import scored_block


def of_tokens(text: bytes, ends: list[int], gold: list[float], *, end_row: bool = False, masked: int = -1) -> Block:
    """A source's block with tokens that end at these bytes; everything but the realised tokens is in the tail."""
    if end_row:
        ends, gold = [*ends, ends[-1]], [*gold, -9.0]
    num_tokens = len(ends)
    mask_T = np.arange(num_tokens) != masked
    return Block(
        text_bytes=text,
        token_ids_T=np.zeros(num_tokens, np.int32),
        byte_ends_T=np.array(ends, np.int32),
        topk_ids_TK=np.zeros((num_tokens, 1), np.int32),
        topk_logprobs_TK=np.array(gold, np.float32)[:, None],
        tail_T=np.log1p(-np.exp(np.array(gold))).astype(np.float32),
        gold_T=np.array(gold, np.float32),
        vocabulary="v",
        mask_T=mask_T,
        ends_document=end_row,
    )


def test_segments_end_where_tokens_of_all_sources_end() -> None:
    left = of_tokens(b"abcdefgh", [2, 3, 6, 8], [-1.0, -0.5, -2.0, -0.25], end_row=True)
    right = of_tokens(b"abcdefgh", [0, 1, 3, 4, 8], [-0.125, -1.0, -1.0, -3.0, -4.0])
    segments = common_segments([left, right])
    assert segments.bytes_N.tolist() == [3, 5]
    assert segments.logprobs_SN.tolist() == [[-1.5, -2.25], [-2.125, -7.0]]


def test_tokens_inside_a_character_belong_to_the_segment_that_it_ends() -> None:
    left = of_tokens("é!".encode(), [2, 2, 3], [-1.0, -2.0, -4.0])
    segments = common_segments([left, of_tokens("é!".encode(), [2, 3], [-1.0, -1.0])])
    assert segments.logprobs_SN[0].tolist() == [-3.0, -4.0]


def test_a_masked_row_and_another_text_are_refused() -> None:
    good = of_tokens(b"ab", [1, 2], [-1.0, -1.0])
    with pytest.raises(ValueError, match="number 1 has masked rows"):
        common_segments([good, of_tokens(b"ab", [1, 2], [-1.0, -1.0], masked=0)])
    with pytest.raises(ValueError, match="number 1 is of another text"):
        common_segments([good, of_tokens(b"ac", [1, 2], [-1.0, -1.0])])


@pytest.mark.parametrize(("num_sources", "spread"), [(2, 0.3), (3, 1.0), (4, 3.0)])
def test_the_best_mixture_is_the_one_that_an_optimiser_finds(num_sources: int, spread: float) -> None:
    rng = np.random.default_rng(num_sources)
    level_S1 = rng.normal(size=(num_sources, 1)) * 0.5
    segments = Segments(
        -np.abs(rng.normal(size=(num_sources, 400)) * spread + 3 + level_S1), rng.integers(1, 9, 400).astype(np.int64)
    )

    def loss(logits: np.ndarray) -> float:
        weights = np.exp(logits - logits.max())
        return mixture_nats_per_byte(segments, weights / weights.sum())

    tries = [
        minimize(loss, rng.normal(size=num_sources), method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-12})
        for _ in range(2)
    ]
    best = best_mixture(segments)
    assert best.nats_per_byte == pytest.approx(min(found.fun for found in tries), abs=1e-6)
    assert best.weight_S.sum() == pytest.approx(1.0) and best.weight_S.min() >= 0
    alone = [best_mixture(segments.of([source])).nats_per_byte for source in range(num_sources)]
    assert best.nats_per_byte <= min(alone) + 1e-7


def test_a_source_that_is_worse_everywhere_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    good = -rng.uniform(0.5, 2.0, 200)
    best = best_mixture(Segments(np.stack([good - 1.0, good]), np.full(200, 4)))
    assert best.weight_S == pytest.approx([0.0, 1.0], abs=1e-6)
    assert best.nats_per_byte == pytest.approx(-good.mean() / 4)


def rows_of(ids: list[list[int]], probs: list[list[float]], mask: list[bool]) -> ProjectedRows:
    num_tokens = len(ids)
    zeros = np.zeros(num_tokens, np.float32)
    return ProjectedRows(np.array(ids, np.int32), np.array(probs, np.float32), zeros, zeros, np.array(mask), zeros)


def test_sources_disagree_where_their_likeliest_tokens_differ() -> None:
    left = rows_of([[1, 2], [3, 4], [5, 6], [7, -1]], [[0.6, 0.4], [0.1, 0.9], [0.9, 0.1], [0.5, 0]], [True] * 4)
    right = rows_of(
        [[2, 1], [4, 3], [6, 5], [-1, -1]], [[0.4, 0.6], [0.2, 0.1], [0.9, 0.1], [0, 0]], [True] * 3 + [False]
    )
    assert likeliest_ids(left).tolist() == [1, 4, 5, 7]
    differ_T, shared_T = disagreement([left, right])
    assert differ_T.tolist() == [False, False, True, False]
    assert shared_T.tolist() == [True, True, True, False]


def test_the_mass_outside_k_candidates_is_the_tail_and_what_a_smaller_k_adds() -> None:
    block = scored_block(num_tokens=40, k=8, seed=3, sharpness=2.0)
    outside = mass_outside(block, [0, 2, 8, 99])
    probs_TK, tail_T = np.exp(block.topk_logprobs_TK[block.mask_T]), np.exp(block.tail_T[block.mask_T])
    assert outside == pytest.approx(
        [1.0, (tail_T + probs_TK[:, 2:].sum(axis=1)).mean(), tail_T.mean(), tail_T.mean()], rel=1e-4
    )
