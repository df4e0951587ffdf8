"""Labels by intervention against an enumeration, BM25 against its formula."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from fusion_core.recall.labels import LabelConfig, bm25, differences, moved, relevant, start_levels

BLOCKS = ["the red fox", "a blue whale sings", "the fox of the whale", "nothing here"]


def test_bm25_is_the_formula_over_the_blocks() -> None:
    def score(question: str, block: str) -> float:
        texts = [[word for word in text.split() if len(word) > 1] for text in BLOCKS]
        words = [word for word in block.split() if len(word) > 1]
        mean = sum(map(len, texts)) / len(texts)
        total = 0.0
        for word in question.split():
            containing = sum(word in text for text in texts)
            times = words.count(word)
            weight = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            total += weight * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        return total

    for question in ("fox", "whale fox", "the nothing", "absent"):
        np.testing.assert_allclose(bm25(question, BLOCKS), [score(question, block) for block in BLOCKS], rtol=1e-5)


def test_labels_start_with_the_best_blocks_that_share_a_word() -> None:
    assert start_levels("red fox", BLOCKS, LabelConfig()).tolist() == [1, 0, 1, 0]
    assert start_levels("sings", BLOCKS, LabelConfig()).tolist() == [
        0,
        1,
        0,
        0,
    ]  # one block shares a word, so one is labelled
    assert start_levels("?!", BLOCKS, LabelConfig()).tolist() == [0, 0, 0, 0]
    assert start_levels("fox", [], LabelConfig()).tolist() == []


def test_levels_move_as_an_enumeration_of_all_losses_says() -> None:
    draw, config = random.Random(1), LabelConfig()
    moves = 0
    for _ in range(200):
        blocks = draw.randint(1, 6)
        held = sorted(draw.sample(range(blocks), draw.randint(1, blocks)))
        levels = [draw.randint(-1, 2) for _ in range(blocks)]
        table = {without: draw.uniform(0.5, 1.5) for without in (None, *held)}

        def loss(texts: Sequence[Sequence[int]], held: list[int] = held, table: dict = table) -> np.ndarray:
            missing = [[block for block in held if block not in text] for text in texts]
            assert all(len(gone) <= 1 for gone in missing)
            return np.array([table[gone[0] if gone else None] for gone in missing])

        middle = statistics.median(table[block] - table[None] for block in held) if len(held) > 2 else 0.0
        expected = list(levels)
        for block in held:
            rise = table[block] - table[None] - middle
            if rise >= 0.2:
                expected[block] = min(2, levels[block] + 1)
            elif rise <= -0.05:
                expected[block] = max(-1, levels[block] - 1)
        after = moved(np.array(levels, dtype=np.int8), held, differences(loss, held), config)
        assert after.tolist() == expected
        assert relevant(after).tolist() == [level > 0 for level in expected]
        moves += expected != levels
    assert moves > 100


def test_a_block_of_which_nothing_is_known_keeps_its_level() -> None:
    assert moved(np.array([1, 0], dtype=np.int8), [0, 1], np.array([np.nan, 0.5]), LabelConfig()).tolist() == [1, 1]


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_core.recall.labels.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bm25s is not installed; the extra `recall` has it"):
        bm25("fox", BLOCKS)
