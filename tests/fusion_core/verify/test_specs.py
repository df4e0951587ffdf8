"""Specs as they enter, and the program of an answer."""

from __future__ import annotations

from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.verify.constraints import CONSTRAINTS
from fusion_core.verify.json_schema import KEYWORDS
from fusion_core.verify.programs import code_of, program_of
from fusion_core.verify.specs import ProgramSpec, parse_spec, read_spec
from tests.fusion_core.verify.nasty_texts import nasty_texts

PARAMETERS = ("words", "word", "letter", "text", "splitter", "script", "marker", "prompt", "paragraph", "options")
WORDS = ("kind", "name", "expected", "tolerance", "schema", "at_least", "at_most", *PARAMETERS, *sorted(KEYWORDS))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "answers"}, "^kind: 'answers' is none of answer, constraints, json_schema, program"),
        ([], "^kind: "),
        ({"kind": []}, "^kind: "),
        ({"kind": "constraints", "constraints": [{"name": {}}]}, r"^constraints\[0\]\.name: "),
        ({"kind": "answer"}, "^expected: a number, or a string"),
        ({"kind": "answer", "expected": " "}, "^expected: "),
        ({"kind": "answer", "expected": True}, "^expected: "),
        ({"kind": "answer", "expected": "1", "tolerance": 1}, "^tolerance: a number from 0 to below 1, got 1"),
        ({"kind": "answer", "expected": "1", "tolerance": float("nan")}, "^tolerance: "),
        ({"kind": "answer", "expects": "1"}, "^expects: unknown key; kind answer has expected, tolerance"),
        ({"kind": "constraints", "constraints": []}, "^constraints: a list of 1 to 64 objects"),
        (
            {"kind": "constraints", "constraints": [{"name": "json"}, {"name": "x"}]},
            r"^constraints\[1\]\.name: 'x' is none of",
        ),
        ({"kind": "json_schema"}, "^schema: is missing"),
        ({"kind": "json_schema", "schema": {"format": "date"}}, "^schema: format: not supported"),
        ({"kind": "program", "functions": [], "tests": "x"}, "^functions: a list of at least one name"),
        ({"kind": "program", "functions": ["a b"], "tests": "x"}, "^functions: "),
        ({"kind": "program", "functions": ["def"], "tests": "x"}, "^functions: "),
        ({"kind": "program", "functions": ["f"], "tests": " "}, "^tests: Python code as a string"),
        ({"kind": "program", "functions": ["f"], "tests": "x", "prompt": 1}, "^prompt: Python code as a string"),
    ],
)
def test_the_key_that_is_wrong_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([*CONSTRAINTS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=10,
)
GOOD = st.sampled_from(
    [
        {"kind": "answer", "expected": "1/2", "tolerance": 0.1},
        {"kind": "json_schema", "schema": {"type": "array", "items": {"minLength": 1}, "uniqueItems": True}},
        *({"kind": "constraints", "constraints": [{"name": name}]} for name in CONSTRAINTS),
    ]
)


@given(
    GOOD, st.dictionaries(st.sampled_from(WORDS), JSON, max_size=3), st.text() | st.sampled_from(["[1]", "1/2", "A b."])
)
def test_whatever_is_asked_is_refused_with_a_reason_or_judged(
    good: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    inside = {key: changes[key] for key in changes if key not in {"kind", "name", "expected", "schema"}}
    wanted = [{**good, **changes}]
    if good["kind"] == "constraints":
        wanted.append({**good, "constraints": [{**good["constraints"][0], **inside}]})
    elif good["kind"] == "json_schema":
        wanted.append({**good, "schema": {**good["schema"], **inside}})
    for value in wanted:
        try:
            spec = read_spec(value)
        except ValueError as error:
            assert str(error)
            continue
        if not isinstance(spec, ProgramSpec):
            verdict = spec.judge(text)
            assert verdict.right == (verdict.score == 1) == (not verdict.reason)
            assert 0 <= verdict.score <= 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 10**5, b"1" * 10**5])
def test_a_spec_that_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(not JSON|kind): "):
        parse_spec(data)


def test_a_number_may_stand_for_its_text() -> None:
    assert parse_spec(b'{"kind": "answer", "expected": 12}').judge("#### 12.0").right  # type: ignore[union-attr]
    spec = read_spec({"kind": "program", "functions": ["f"], "tests": "f(1)"})
    assert spec == ProgramSpec(("f",), "f(1)")


PROMPT = 'import math\n\ndef half(x):\n    """Return half of x."""\n'


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("def half(x): return x / 2", ""),
        ("Sure!\n```python\ndef half(x):\n    return x / 2\n```\nDone.", ""),
        ("```\nwrong(\n```\nbetter:\n```py\ndef half(x):\n    return x / 2\n```", ""),
        ("```sh\npip install x\n```\n~~~python\ndef half(x):\n    return x / 2\n~~~\n```text\n1\n```", ""),
        ("```python\ndef half(x):\n    return x / 2", ""),
        ("    return x / 2\n", PROMPT),
        ("\n    y = x\n    return y / 2\n", PROMPT),
        ("def half(x):\n    return math.ldexp(x, -1)\n", PROMPT),
        ("```python\ndef half(x):\n    return math.ldexp(x, -1)\n```", PROMPT),
        ("    return x / 2\n", "def half(x):\n"),
        ("def half(x):\n    return x / 2\n", "def half(x):\n"),
        ("```python\n    return x / 2\n```", PROMPT),
    ],
)
def test_the_program_of_an_answer_does_what_the_answer_says(answer: str, prompt: str) -> None:
    namespace: dict[str, Any] = {}
    exec(program_of(answer, prompt), namespace)  # these answers are ours
    assert namespace["half"](6) == 3


def test_an_answer_without_a_block_is_code_as_it_stands() -> None:
    assert code_of("x = 1\n") == "x = 1\n"
    assert code_of("") == ""
    assert code_of("```json\n{}\n```") == "```json\n{}\n```"


def test_long_texts_of_any_kind_are_cut_out_at_once() -> None:
    for text in nasty_texts():
        start = process_time()
        program_of(text, PROMPT)
        assert process_time() - start < 1, text[:40]
