"""Rows made of judged answers."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fusion_core.preference.overlap import HeldOutPrompts
from fusion_core.preference.pairs import Candidate, best_of, capped, preference_pairs

ANSWERS = [
    Candidate("p", "big", 0, "best", 0.9, True),
    Candidate("p", "big", 1, "poor", 0.2, False),
    Candidate("p", "big", 2, "middling", 0.5, False),
    Candidate("p", "small", 0, "fair", 0.8, True),
    Candidate("p", "small", 1, "fair too", 0.8, True),
    Candidate("q", "small", 0, "bad", 0.1, False),
    Candidate("q", "big", 0, " ", 1.0, True),
]

candidates = st.lists(
    st.builds(
        Candidate,
        prompt=st.sampled_from("pqr"),
        source=st.sampled_from(["big", "small"]),
        number=st.integers(0, 3),
        text=st.sampled_from(["", "a", "b", "c", "d"]),
        score=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        right=st.sampled_from([True, False]),
    ),
    max_size=24,
)


def test_the_best_answer_over_all_sources_is_kept() -> None:
    assert [answer.text for answer in best_of(ANSWERS)] == ["best"], "q has no answer that is right and says something"
    assert [answer.text for answer in best_of(ANSWERS, least_score=0.1)] == ["best", "bad"]
    assert {answer.text for answer in best_of(ANSWERS, per_prompt=3)} == {"best", "fair", "fair too"}


def test_pairs_are_of_one_source_within_the_gap() -> None:
    [pair] = preference_pairs(ANSWERS, "within_source", least_gap=0.0)
    assert (pair.chosen.text, pair.rejected.text) == ("best", "poor"), "the widest gap; small's two answers are a tie"
    [pair] = preference_pairs(ANSWERS, "within_source", least_gap=0.1, most_gap=0.5)
    assert (pair.chosen.text, pair.rejected.text) == ("best", "middling")
    assert preference_pairs(ANSWERS, "within_source", least_gap=0.8) == []


def test_right_and_wrong_pair_across_sources() -> None:
    pairs = preference_pairs(ANSWERS, "right_and_wrong", least_gap=0.0, per_prompt=9)
    assert len(pairs) == 6
    assert all(pair.chosen.right and pair.rejected.right is False for pair in pairs)


@given(candidates, st.integers(0, 99))
def test_the_order_of_the_answers_does_not_matter(answers: list[Candidate], seed: int) -> None:
    shuffled = random.Random(seed).sample(answers, len(answers))

    def texts(given: list[Candidate]) -> set[tuple[str, str, str]]:
        pairs = preference_pairs(given, "within_source", least_gap=0.2, per_prompt=2)
        best = best_of(given, per_prompt=2)
        return {(p.chosen.prompt, p.chosen.text, p.rejected.text) for p in pairs} | {
            (b.prompt, b.text, "") for b in best
        }

    assert texts(answers) == texts(shuffled)


@given(candidates)
def test_every_pair_keeps_the_rules(answers: list[Candidate]) -> None:
    for pair in preference_pairs(answers, "within_source", least_gap=0.25, most_gap=0.5, per_prompt=3):
        assert pair.chosen.source == pair.rejected.source and pair.chosen.prompt == pair.rejected.prompt
        assert 0.25 <= pair.chosen.score - pair.rejected.score <= 0.5
        assert pair.chosen.text.strip() and pair.rejected.text.strip() and pair.chosen.text != pair.rejected.text


def test_a_cap_keeps_the_same_prompts_whatever_else_is_there() -> None:
    keys = [f"prompt {number}" for number in range(50)]
    kept = {keys[place] for place in capped(keys, 10)}
    assert len(kept) == 10
    shorter = keys[20:]
    assert kept & set(shorter) <= {shorter[place] for place in capped(shorter, 10)}
    assert capped(keys, None) == list(range(50))


def test_held_out_prompts_are_found_by_runs_of_words() -> None:
    prompt = "Write a short poem about the sea in which every single line begins with a vowel"
    held_out = HeldOutPrompts([prompt, "What is 3 + 4?"], share=0.8)
    assert held_out.found_in(f"Please: {prompt.upper()}! Thanks.")
    assert held_out.found_in("what is 3 4")
    assert not held_out.found_in("What is 13 + 4?")
    assert not held_out.found_in("Write a short poem about the sea in which nothing rhymes")
    assert not held_out.found_in("")


def test_a_text_that_comes_again_with_a_poorer_score_keeps_its_best() -> None:
    again = [
        Candidate("p", "s", number, text, score, None)
        for number, (text, score) in enumerate([("A", 1.0), ("B", 0.9), ("A", 0.5)])
    ]
    assert [answer.text for answer in best_of(again, least_score=0.0)] == ["A"]
    [pair] = preference_pairs(again, "within_source", least_gap=0.0, most_gap=None, per_prompt=1)
    assert (pair.chosen.text, pair.chosen.score, pair.rejected.text) == ("A", 1.0, "B")
