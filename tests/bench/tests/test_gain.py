"""The parts of the gain benchmark that could make its figures wrong without anyone noticing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fusion_core.blocks import PADDING_ID, Block
from fusion_core.vocabulary import Vocabulary
from services.fusion.client import StreamRequest
from services.fusion.order import StreamPlan
from tests.bench.gain import differences, interval
from tests.bench.parts.gain_blocks import BlocksInMemory, as_published, first_candidates
from tests.fakes.fusion_stream import FakeFusion, corpus


@pytest.fixture(scope="module")
def blocks(target) -> list[Block]:
    fusion = FakeFusion(target, corpus(9))
    return [fusion.block(text, tokens_only=False, k=8) for text in corpus(9)]


def test_every_window_comes_once_an_epoch_in_the_order_of_the_service(blocks, target):
    stream = BlocksInMemory(Vocabulary.from_pretrained(target), {"train": blocks, "validation": blocks[:2]})
    windows = list(stream.stream(StreamRequest(dataset="gain", split="train", seed=4, num_epochs=2)))
    [split] = [split for split in stream.info().datasets if split.split == "train"]
    plan = StreamPlan(split.fingerprint, 9, seed=4, rank=0, world_size=1, num_epochs=2)
    assert [window.index for window in windows] == [step.index for step in plan.windows(None)]
    assert sorted(window.index for window in windows[:9]) == list(range(9))
    assert all(window.block is blocks[window.index] for window in windows)
    [rest] = [list(stream.stream(StreamRequest("gain", "train", seed=4, num_epochs=2, cursor=windows[5].cursor)))]
    assert [window.index for window in rest] == [window.index for window in windows[6:]]


def test_fewer_candidates_keep_the_mass_of_a_row(blocks):
    cut = first_candidates(blocks[0], 3)
    cut.validate()
    assert cut.k == 3
    mass_T = np.exp(cut.topk_logprobs_TK.astype(np.float64)).sum(axis=1) + np.exp(cut.tail_T.astype(np.float64))
    assert mass_T == pytest.approx(1.0, abs=1e-5)


def test_published_rows_have_no_tail_and_fall_back_on_the_realised_token(blocks):
    block = blocks[0]
    empty = replace(
        block,
        topk_ids_TK=np.where(block.mask_T[:, None], block.topk_ids_TK, PADDING_ID).astype(np.int32),
        topk_logprobs_TK=np.where(block.mask_T[:, None], block.topk_logprobs_TK, -np.inf).astype(np.float32),
    )
    rows = as_published(empty)
    rows.validate()
    assert rows.mask_T.all() and np.isneginf(rows.tail_T).all()
    assert np.exp(rows.topk_logprobs_TK).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    for t in np.flatnonzero(~block.mask_T):
        assert rows.topk_ids_TK[t, 0] == block.token_ids_T[t] and rows.topk_logprobs_TK[t, 0] == 0
    ratio_TK = (rows.topk_logprobs_TK - block.topk_logprobs_TK)[block.mask_T]
    assert ratio_TK == pytest.approx(np.broadcast_to(ratio_TK[:, :1], ratio_TK.shape), abs=1e-4)


def test_differences_are_paired_over_documents_and_seeds():
    rng = np.random.default_rng(0)
    document_W = np.repeat(np.arange(30), 2)
    bytes_W = rng.integers(100, 1000, 60)
    hard_W = rng.uniform(0.5, 2.5, 60) * bytes_W
    base_SW = hard_W + rng.normal(0, 1, (3, 60))
    drawn = differences({"base": base_SW, "better": base_SW - 0.05 * bytes_W}, document_W, bytes_W)
    assert drawn["base"][0] == pytest.approx(base_SW.sum() / (3 * bytes_W.sum()))
    assert interval(drawn["better"] - drawn["base"], 30) == pytest.approx((-0.05, -0.05, -0.05))
    value, low, high = interval(drawn["base"], 30)
    assert low is not None and high is not None
    assert low < value < high and high - low > 0.1
    # One document that is far better with one seed alone makes the difference uncertain.
    lucky_SW = base_SW.copy()
    lucky_SW[0, :2] -= 200
    lucky = differences({"a": base_SW, "b": lucky_SW}, document_W, bytes_W)["b"]
    value, low, high = interval(lucky - drawn["base"], 30)
    assert value < 0 and high == pytest.approx(0, abs=1e-9)
    assert interval(drawn["base"], 7) == (drawn["base"][0], None, None)
