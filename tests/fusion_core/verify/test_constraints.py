"""Every constraint with texts that fulfil and break it, written by hand; parameters that are refused."""

from __future__ import annotations

from time import process_time
from typing import Any

import pytest

from fusion_core.verify.constraints import CONSTRAINTS, check_constraint, fulfils, num_sentences
from fusion_core.verify.specs import read_spec
from tests.fusion_core.verify.nasty_texts import nasty_texts

CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"name": "words", "at_least": 3, "at_most": 4}, ["Well-known men don't", "a b c d."], ["two words", "a b c d e"]),
    ({"name": "words", "at_most": 2}, ["one", "naïve café"], ["one two three", "", " \n"]),
    (
        {"name": "sentences", "at_least": 2, "at_most": 2},
        ["Mr. Smith paid 3.50 pounds. He left!", "One? Two", '"Stop." She left...', "你好。再见。"],
        ["Only one, e.g. this.", "One. Two. Three.", "..."],
    ),
    (
        {"name": "paragraphs", "at_least": 2, "at_most": 2},
        ["a\n\nb", "a\n***\nb\n", "a\n \n\n\nb"],
        ["a\nb", "a\n\nb\n\nc"],
    ),
    (
        {"name": "bullets", "at_least": 2, "at_most": 2},
        ["* a\n* b", "x\n- a\n  - b", "1. a\n2. b"],
        ["* a", "*a*\n-b", "- a\n- b\n- c"],
    ),
    (
        {"name": "keywords", "words": ["Apple", "ice cream"]},
        ["apple and ICE  cream"],
        ["pineapple and ice cream", "apple ice"],
    ),
    ({"name": "forbidden_words", "words": ["bad", "very good"]}, ["badge", "good very"], ["Bad!", "a very, good one"]),
    ({"name": "keyword_count", "word": "so", "at_least": 2, "at_most": 2}, ["So so soon"], ["so", "so so so"]),
    ({"name": "keyword_count", "word": "a b", "at_least": 2}, ["a b a b"], ["a b a"]),
    ({"name": "letter_count", "letter": "E", "at_most": 1}, ["the man", "no"], ["these men"]),
    ({"name": "capital_words", "at_least": 1, "at_most": 1}, ["a BIG dog", "NASA"], ["A dog", "BIG DOG"]),
    ({"name": "all_uppercase"}, ["HELLO, 3 MEN!"], ["Hello", "123"]),
    ({"name": "all_lowercase"}, ["hello, 3 men!"], ["Hello", "123"]),
    ({"name": "no_commas"}, ["a; b"], ["a, b", "一，二"]),
    ({"name": "starts_with", "text": "Dear Sir"}, [" dear sir, hello"], ["My dear Sir"]),
    (
        {"name": "ends_with", "text": "Any other questions?"},
        ['"... any other questions?" '],
        ["Any other questions? Yes."],
    ),
    (
        {"name": "json"},
        ['{"a": [1, null]}', "```json\n[1]\n```", "3"],
        ["{a: 1}", "Here: {}", "NaN", "[" * 100_000, "1" * 5_000],
    ),
    ({"name": "placeholders", "at_least": 2}, ["[name] lives in [town]"], ["[name]", "[]"]),
    ({"name": "title"}, ["<<My story>>\nOnce"], ["<My story>", "<<>>", "<< >>"]),
    (
        {"name": "sections", "splitter": "SECTION", "at_least": 2},
        ["SECTION 1\na\n## SECTION 2\nb"],
        ["SECTION 1 SECTION 2"],
    ),
    ({"name": "highlights", "at_least": 2, "at_most": 2}, ["*a* and **b c**"], ["*a", "*a* *b* *c*"]),
    ({"name": "script", "script": "cyrillic"}, ["Привет, мир 123"], ["Hello мир", "123", "Привет hello"]),
    ({"name": "script", "script": "japanese"}, ["これは日本語です"], ["this is English"]),
    ({"name": "script", "script": "latin"}, ["Où est-il?"], ["где"]),
    ({"name": "quotation"}, ['"Quoted."', "«oui»", " “so” "], ['"half', '""', "plain"]),
    ({"name": "postscript", "marker": "P.S."}, ["Bye\nP.S. one more"], ["Bye\nP.S.", "Bye P.S. inside"]),
    ({"name": "repeat_prompt", "prompt": "Say  it."}, ["Say it. Then more"], ["Say it.", "I say it. Then"]),
    ({"name": "two_responses"}, ["one ****** two"], ["same ****** same", "one", "a ****** b ****** c", "a ******"]),
    ({"name": "first_word", "paragraph": 2, "word": "Then"}, ["First\n\n**Then** so"], ["Then\n\nFirst", "Then"]),
    (
        {"name": "one_of", "options": ["My answer is yes.", "Maybe"]},
        ["my answer is yes", " Maybe. "],
        ["My answer is yes, maybe"],
    ),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), CASES)
def test_texts_fulfil_or_break_it(constraint: dict[str, Any], good: list[str], bad: list[str]) -> None:
    name, parameters = check_constraint(constraint)
    assert [text for text in good if not fulfils(text, name, parameters)] == []
    assert [text for text in [*bad, "", " \n"] if fulfils(text, name, parameters)] == []


def test_every_constraint_has_a_case() -> None:
    assert {constraint["name"] for constraint, _, _ in CASES} == set(CONSTRAINTS)


def test_the_score_is_the_share_that_is_fulfilled() -> None:
    spec = read_spec(
        {
            "kind": "constraints",
            "constraints": [{"name": "no_commas"}, {"name": "words", "at_most": 2}, {"name": "json"}],
        }
    )
    assert (spec.judge("[1]").right, spec.judge("[1]").score) == (True, 1.0)
    verdict = spec.judge("one two")
    assert (verdict.right, round(verdict.score, 4)) == (False, 0.6667)
    assert "json" in verdict.reason
    assert spec.judge("").score == 0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"name": "wards"}, "^name: 'wards' is none of words, "),
        ("words", "^name: 'words' is none of"),
        ({"name": "words"}, "^at_least, at_most: words needs one of them"),
        ({"name": "words", "at_most": -1}, "^at_most: words needs an integer from 0, got -1"),
        ({"name": "words", "at_most": True}, "^at_most: words needs an integer"),
        ({"name": "words", "most": 1}, "^most: words has no such parameter; allowed: at_least, at_most"),
        ({"name": "json", "at_most": 1}, "^at_most: json has no such parameter; allowed: none"),
        ({"name": "keywords", "words": []}, "^words: keywords needs a list of strings with words"),
        ({"name": "keywords", "words": ["!"]}, "^words: keywords needs"),
        ({"name": "keyword_count", "word": "?", "at_most": 1}, "^word: keyword_count needs a string with a word in it"),
        ({"name": "starts_with", "text": " "}, "^text: starts_with needs a string that is not blank"),
        ({"name": "script", "script": "klingon"}, "^script: 'klingon' is none of latin"),
        ({"name": "first_word", "paragraph": 0, "word": "a"}, "^paragraph: first_word needs an integer from 1"),
    ],
)
def test_a_wrong_parameter_is_named(constraint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_constraint(constraint)


def test_long_texts_of_any_kind_are_judged_at_once() -> None:
    by_name = {constraint["name"]: constraint for constraint, _, _ in CASES}
    for text in nasty_texts():
        for name, parameters in map(check_constraint, by_name.values()):
            start = process_time()
            fulfils(text, name, parameters)
            assert process_time() - start < 1, (name, text[:40])


def test_sentences_are_counted_by_their_ends() -> None:
    assert [num_sentences("A. " * number) for number in range(5)] == [0, 1, 2, 3, 4]
    assert num_sentences("Dr. No vs. Mr. Yes etc. is a film. It is old") == 2
