"""Final answers of mathematics: hand-written cases, and generated ones whose value is known beforehand."""

from __future__ import annotations

import random
from fractions import Fraction
from time import process_time

import pytest

from fusion_core.verify.final_answer import final_answer
from fusion_core.verify.specs import read_spec
from fusion_core.verify.values import same_answer
from tests.fusion_core.verify.nasty_texts import nasty_texts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Hence \boxed{1,000}.", "1,000"),
        (r"\boxed{3}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{\boxed{7}}{2}}", "7"),
        (r"\boxed{2} and then \boxed{never closed", "2"),
        (r"\boxed 5", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("It costs 5.\n#### 12\n", "12"),
        ("#### 12\nIn the end \\boxed{13}", "13"),
        ("The answer is 3. No, the answer is -4.", "-4"),
        ("**Answer:** 12", "12"),
        ("The answer to the first part of this is 7.5.", "7.5"),
        ("So the final answer is:\n42", "42"),
        ("ANSWER: B", "B"),
        ("First 3 apples, then 1,250 apples.", "1,250"),
        ("x = -3", "-3"),
        ("I cannot say.", None),
        ("", None),
        ("the answer is", None),
    ],
)
def test_the_last_final_answer_of_the_strongest_kind_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


SAME = [
    ("1,000", "1000"),
    ("-3", "−3"),
    ("+3", "3"),
    ("3.50", "3.5"),
    (".5", "0.5"),
    (r"\frac34", "0.75"),
    ("3/4", r"\dfrac{3}{4}"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    (r"-\frac{1}{2}", "-0.5"),
    ("-(3)", "-3"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("50 percent", "50%"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2^{-2}", "0.25"),
    ("10^3", "1000"),
    ("$5", "5"),
    (r"5 \text{ dollars}", "5"),
    ("12 cm^2", "12"),
    (r"90^\circ", "90"),
    ("x = 5", "5"),
    ("(1, 2)", "(1.0,2)"),
    ("{1, 1/2}", "{1,0.5}"),
    ("3, 4", "3,4"),
    (r"\text{(B)}", "b"),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{ \sqrt{3} }{2}"),
    (r"\left( \frac{1}{2}, 2 \right)", "(0.5, 2)"),
    ("10^(10^10)", "10^(10^10)"),
    ("9^9999", "9^9999"),
    ("1/0", "1/0"),
    ("**12**", "12"),
    ("12.", "12"),
    ("two", "Two"),
]
OTHER = [
    ("1,000", "1"),
    ("-3", "3"),
    ("3.50", "3.05"),
    ("5 million", "5"),
    ("5x", "5"),
    ("3 or 4", "3"),
    ("5 or less", "5"),
    ("3, 4", "4, 3"),
    ("3", "3, 4"),
    ("(1, 2)", "[1, 2]"),
    ("0.333", "1/3"),
    ("10^(10^10)", "10"),
    ("10^10000", "10^10001"),
    ("1e999", "1"),
    ("1/0", "0"),
    ("0^0", "1"),
    ("", "0"),
    ("50%", "5"),
    ("0.5%", "0.5e2"),
    ("1" * 3000, "1" * 3000),
    ("(" * 500 + "1" + ")" * 500, "2"),
    ("2^100", "2^101"),
    ("٣", "4"),
    ("½", "0.25"),
    ("A", "B"),
]


@pytest.mark.parametrize(("given", "expected"), SAME)
def test_the_same_value_in_other_words_is_right(given: str, expected: str) -> None:
    assert same_answer(given, expected)
    assert same_answer(expected, given)


@pytest.mark.parametrize(("given", "expected"), OTHER)
def test_another_value_is_wrong(given: str, expected: str) -> None:
    assert not same_answer(given, expected)
    assert not same_answer(expected, given)


def test_a_tolerance_is_relative_to_the_expected_number() -> None:
    assert same_answer("0.3333", "1/3", tolerance=1e-3)
    assert not same_answer("0.33", "1/3", tolerance=1e-3)
    assert not same_answer("x", "1/3", tolerance=0.9)


def a_number(random_: random.Random) -> Fraction:
    """Integers, decimals and fractions of either sign, none of them 0, 1 or -1."""
    while True:
        kind = random_.randrange(3)
        value = Fraction(random_.randrange(-(10**6), 10**6))
        if kind == 1:
            value /= 10 ** random_.randrange(1, 5)
        elif kind == 2:
            value = Fraction(random_.randrange(-99, 99), random_.randrange(2, 60))
        if abs(value) not in {0, 1}:
            return value


def written(value: Fraction, random_: random.Random) -> str:
    """One of the ways to write a number."""
    sign, size = ("-" if value < 0 else random_.choice(["", "", "+"])), abs(value)
    top, bottom = size.numerator, size.denominator
    ways = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"{sign}\dfrac{{{top}}}{{{bottom}}}"]
    if bottom == 1:
        ways += [
            f"{sign}{top}",
            f"{sign}{top:,}",
            f"{sign}{top}.0",
            rf"{sign}{top}\text{{ apples}}",
            f"{sign}{top * 100}%",
        ]
    elif size > 1:
        ways.append(f"{sign}{top // bottom} {top % bottom}/{bottom}")
    if 10**6 % bottom == 0:
        scaled = size * 10**6
        digits = f"{int(scaled):07d}"
        ways += [
            f"{sign}{digits[:-6]}.{digits[-6:]}",
            f"{sign}{int(scaled)}e-6",
            rf"{sign}{int(scaled)} \times 10^{{-6}}",
        ]
    return random_.choice(ways)


def solution(answer: str, random_: random.Random) -> str:
    """A worked solution that ends with an answer, and has other numbers in it."""
    return random_.choice(
        [
            f"There are 17 of them, so \\boxed{{{answer}}}.",
            f"First \\boxed{{12345}}, which is wrong. Then $\\boxed{{{answer}}}$ is the result of step 9.",
            f"We count 99 and 3.\n#### {answer}",
            f"17 + 4 = 21, hence the answer is {answer}",
            f"Step 1: 8 * 9 = 72.\n**Final answer:** {answer}",
        ]
    )


def test_500_right_and_500_wrong_answers_are_told_apart() -> None:
    random_ = random.Random(3)
    for _ in range(500):
        value = a_number(random_)
        spec = read_spec({"kind": "answer", "expected": written(value, random_)})
        right = solution(written(value, random_), random_)
        assert spec.judge(right).right, (spec, right)
        near = [value + 1, -value, 1 / value, value * 10, value / 10, value + Fraction(1, 10**4)]
        other = random_.choice([number for number in near if number not in {value, value * 100, value / 100}])
        wrong = solution(written(other, random_), random_)
        while "%" in wrong + spec.expected:  # 5% is both 5 and 0.05
            spec = read_spec({"kind": "answer", "expected": written(value, random_)})
            wrong = solution(written(other, random_), random_)
        verdict = spec.judge(wrong)
        assert (verdict.right, verdict.score) == (False, 0.0), (spec, wrong)
        assert verdict.reason


@pytest.mark.parametrize("expected", ["5", "(1, 2)"])
def test_long_texts_of_any_kind_are_judged_at_once(expected: str) -> None:
    spec = read_spec({"kind": "answer", "expected": expected})
    for text in nasty_texts():
        start = process_time()
        assert not spec.judge(text).right
        assert process_time() - start < 1, text[:40]


def test_a_megabyte_is_judged_at_once() -> None:
    spec = read_spec({"kind": "answer", "expected": "10^(10^10)"})
    for part in ("1", "so it is ", "the answer is 5. ", "\\boxed{5} ", "\\boxed{"):
        text = part * (10**6 // len(part))
        start = process_time()
        assert not spec.judge(text).right
        assert spec.judge(text + "\nThe answer is 10^(10^10)").right == ("boxed{5}" not in part)
        assert process_time() - start < 2, part


def test_no_power_is_computed_blindly() -> None:
    start = process_time()
    for text in (
        "10^(10^10)",
        "9^9^9^9",
        "10^999999999",
        "999999999^9999",
        "2^{9999}",
        "1e999",
        "7!!!!!!!!!",
        "1" * 1999,
    ):
        assert not same_answer(text, "4")
        assert same_answer(text, text)
    assert process_time() - start < 1
