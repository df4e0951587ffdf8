"""MemRecall against traces that were written by hand, under a judge that follows a script."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fusion_core.recall.memory import MemoryConfig, Recalled, recall


class ScriptedJudge:
    """A judge whose score of a block depends on the blocks that it reads with it, and who keeps what it was shown."""

    def __init__(self, alone: Sequence[float], together: dict[tuple[int, int], float] | None = None) -> None:
        """`together[a, b]` replaces the score of block a where block b stands before it or is read with it."""
        self.alone, self.together = alone, together or {}
        self.calls: list[list[list[int]]] = []

    def __call__(self, windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        self.calls.append([list(window) for window in windows])
        return [np.array([self._score(block, window) for block in window]) for window in windows]

    def _score(self, block: int, window: Sequence[int]) -> float:
        return max([self.alone[block], *(self.together.get((block, other), 0.0) for other in window if other != block)])


def test_a_second_hop_finds_the_block_that_only_the_first_one_points_to() -> None:
    # Question 4 tokens, blocks of 10, window 34: three blocks each. Block 4 matters only beside block 1.
    judge = ScriptedJudge([0.1, 0.9, 0.2, 0.3, 0.05, 0.0], {(4, 1): 0.95})
    config = MemoryConfig(window_tokens=34, hops=(1, 2), budget_tokens=20)
    found = recall(4, [10] * 6, judge, config)
    assert judge.calls == [
        [[0, 1, 2], [3, 4, 5]],  # the first competition, in the order of the text
        [[1, 2, 3]],  # rehearsal: 1 (0.9), 3 (0.3) and 2 (0.2) entered
        [[1, 0, 2], [1, 3, 4], [1, 5]],  # memory decayed to 1 block, which stands behind the question
        [[1, 3, 4]],  # 4 (0.95) and 3 (0.3) entered
    ]
    assert found == [Recalled(1, 0.9, 1), Recalled(4, 0.95, 2)]


def test_a_single_hop_misses_it() -> None:
    judge = ScriptedJudge([0.1, 0.9, 0.2, 0.3, 0.05, 0.0], {(4, 1): 0.95})
    found = recall(4, [10] * 6, judge, MemoryConfig(window_tokens=34, hops=(2,), budget_tokens=20))
    assert [block.block for block in found] == [1, 3]


def test_rehearsal_puts_right_the_scores_of_windows_that_do_not_compare() -> None:
    # Block 3 wins its own window with 0.9, and is worth 0.1 beside block 0.
    class Jealous(ScriptedJudge):
        def _score(self, block: int, window: Sequence[int]) -> float:
            return 0.1 if block == 3 and 0 in window else self.alone[block]

    scores = [0.8, 0.7, 0.0, 0.9]
    with_it = recall(4, [10] * 4, Jealous(scores), MemoryConfig(window_tokens=24, hops=(1,), budget_tokens=10))
    without = MemoryConfig(window_tokens=24, hops=(1,), budget_tokens=10, rehearsal=False)
    assert with_it == [Recalled(0, 0.8, 1)]
    assert recall(4, [10] * 4, Jealous(scores), without) == [Recalled(3, 0.9, 1)]


def test_the_weak_leave_memory_and_may_come_back() -> None:
    judge = ScriptedJudge([0.5, 0.6, 0.4], {(0, 1): 0.1, (2, 1): 0.7})
    found = recall(2, [5, 5, 5], judge, MemoryConfig(window_tokens=17, hops=(1, 2), budget_tokens=10))
    # In rehearsal 2 is worth 0.7 and is the one that stays; then 1 enters again.
    assert judge.calls == [[[0, 1, 2]], [[0, 1, 2]], [[2, 0, 1]], [[0, 1, 2]]]
    assert found == [Recalled(1, 0.6, 2), Recalled(2, 0.7, 1)]


def test_no_window_is_longer_than_the_judge_reads_and_the_question_has_its_room() -> None:
    draw = np.random.default_rng(3)
    for _ in range(50):
        tokens = draw.integers(1, 20, size=int(draw.integers(1, 30))).tolist()
        question = int(draw.integers(1, 12))
        judge = ScriptedJudge(draw.random(len(tokens)).tolist())
        config = MemoryConfig(window_tokens=32, hops=(3, 5), budget_tokens=int(draw.integers(1, 64)))
        found = recall(question, tokens, judge, config)
        seen = [window for call in judge.calls for window in call]
        assert all(question + sum(tokens[block] for block in window) <= 32 for window in seen)
        assert all(len(set(window)) == len(window) for window in seen)
        assert set(range(len(tokens))) <= {block for window in seen for block in window}
        assert [block.block for block in found] == sorted({block.block for block in found})
        assert sum(tokens[block.block] for block in found) <= config.budget_tokens


def test_the_weakest_leave_a_memory_beside_which_no_block_fits() -> None:
    # Window 24, question 4: memory holds 0 and 1 (16 tokens) after the first hop, and block 2 has 8.
    judge = ScriptedJudge([0.9, 0.8, 0.7])
    recall(4, [8, 8, 8], judge, MemoryConfig(window_tokens=24, hops=(2, 2), budget_tokens=8))
    assert judge.calls == [[[0, 1], [2]], [[0, 1]], [[0, 1], [0, 2]], [[0, 1]]]


def test_the_budget_is_filled_with_the_best_of_the_others() -> None:
    judge = ScriptedJudge([0.1, 0.9, 0.3, 0.2])
    found = recall(4, [10, 10, 25, 5], judge, MemoryConfig(window_tokens=64, hops=(1,), budget_tokens=25))
    # 2 (0.3) has 25 tokens and does not fit behind 1; 3 and 0 do.
    assert found == [Recalled(0, 0.1, 0), Recalled(1, 0.9, 1), Recalled(3, 0.2, 0)]


def test_a_question_too_long_for_the_window_is_refused() -> None:
    with pytest.raises(
        ValueError, match="question: its 30 tokens and a block of 10 do not fit the judge's window of 32"
    ):
        recall(30, [10], ScriptedJudge([1.0]), MemoryConfig(window_tokens=32))


def test_no_block_no_answer() -> None:
    judge = ScriptedJudge([])
    assert recall(4, [], judge, MemoryConfig()) == []
    assert judge.calls == []
