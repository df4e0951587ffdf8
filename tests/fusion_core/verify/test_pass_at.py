"""pass@k against all draws of k answers, one by one."""

from __future__ import annotations

from itertools import combinations

import pytest

from fusion_core.verify.pass_at import pass_at_k


def by_draws(num_right: int, num_samples: int, k: int) -> float:
    answers = [place < num_right for place in range(num_samples)]
    draws = list(combinations(answers, k))
    return sum(map(any, draws)) / len(draws)


@pytest.mark.parametrize(("num_samples", "k"), [(1, 1), (5, 1), (6, 3), (7, 7), (9, 2)])
def test_it_is_the_share_of_draws_with_a_right_answer(num_samples: int, k: int) -> None:
    numbers = range(num_samples + 1)
    expected = [by_draws(number, num_samples, k) for number in numbers]
    assert pass_at_k(list(numbers), num_samples, k).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 6])
def test_more_draws_than_answers_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 5 answers"):
        pass_at_k([2], 5, k)
