r"""Compare final answers of mathematics by value: numbers exactly, lists item by item, everything else as text.

Numbers are integers with or without separators, decimals, `1.5e3` and `1.5 \times 10^3`, fractions (`3/4`, `\frac34`,
`1 1/2`), percentages and small powers. Nothing is evaluated that could grow: `10^(10^10)` is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

LONGEST_ANSWER = 2_000
"""Characters of a final answer that are compared; a longer one is wrong."""
_LONGEST_NUMBER = 400
_MOST_BITS = 4_096
"""Size of the largest power that is computed, in bits."""
_DEEPEST = 16
"""Depth of lists in lists up to which items are compared by value."""

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = rf"(?:{_INTEGER})(?:\.\d+)?|\.\d+"
_EXPONENT = r"([-+]?\d{1,4})"
_PLAIN = re.compile(rf"([-+]?)({_DECIMAL})(?:e([-+]?\d{{1,3}}))?")
_POWER = re.compile(
    rf"([-+]?)(?:({_DECIMAL})\*)?(\d{{1,9}})\^(?:\{{([-+]?\d{{1,4}})\}}|\(([-+]?\d{{1,4}})\)|(\d{{1,4}}))"
)
_RATIO = re.compile(rf"([-+]?)\(?([-+]?(?:{_DECIMAL}))\)?/\(?([-+]?(?:{_DECIMAL}))\)?")
_MIXED = re.compile(r"([-+]?)(\d{1,18}) +(\d{1,18})/(\d{1,18})")
_UNIT = re.compile(r"(?<=[\d%])\s+[^\W\d_]{2,}(?:[ ./][^\W\d_]+){0,3}(?:\^\{?[23]\}?)?\.?$")
_NO_UNITS = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|dozen|and|or|than)s?\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\bpercent$", re.IGNORECASE)
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)(\d)|\{([^{}]*)\}(\d)|(\d)\{([^{}]*)\})")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_WORDS_ONLY = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|limits|quad|qquad|,|!|;|:| )|~|\$|\\\(|\\\)|\\\[|\\\]")
_ASSIGNED = re.compile(r"^(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w{1,4}\}?)?\s*(?:=|\\in)\s*(?=[^=]+$)")
_REPLACED = {
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/", "∞": "\\infty", "π": "\\pi", "°": "", "^\\circ": "",
    "^{\\circ}": "", "\\degree": "", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\times": "*",
    "\\cdot": "*", "\\div": "/", "\\%": "%", "\\$": "", "\\lbrace": "{", "\\rbrace": "}", "\\{": "{", "\\}": "}",
    "£": "", "€": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listed:
    """Items between brackets, or without brackets."""

    opening: str
    items: tuple[Value, ...]
    closing: str


Value: TypeAlias = Fraction | Listed | str


def same_answer(given: str, expected: str, *, tolerance: float = 0.0) -> bool:
    """Return whether two final answers have the same value.

    A percentage equals both the number in front of the sign and its hundredth: `50%` is `50` and `0.5`.

    Args:
        tolerance: largest difference of two numbers, relative to the expected one.
    """
    if len(given) > LONGEST_ANSWER or len(expected) > LONGEST_ANSWER:
        return False
    allowed = Fraction(tolerance)
    given, expected = _normal(given), _normal(expected)
    for one in _percentages(given):
        for other in _percentages(expected):
            if _same(value_of(one), value_of(other), allowed):
                return True
    return False


def value_of(text: str) -> Value:
    """Return the value of a normalised answer."""
    return _value(text, 0)


def _same(given: Value, expected: Value, tolerance: Fraction) -> bool:
    if isinstance(given, Fraction) and isinstance(expected, Fraction):
        return abs(given - expected) <= tolerance * abs(expected)
    if isinstance(given, Listed) and isinstance(expected, Listed):
        brackets = (given.opening, given.closing) == (expected.opening, expected.closing)
        pairs = zip(given.items, expected.items, strict=False)
        return (
            brackets
            and len(given.items) == len(expected.items)
            and all(_same(one, other, tolerance) for one, other in pairs)
        )
    return given == expected


def _normal(text: str) -> str:
    """Return the answer without the ways of writing that do not matter."""
    text = text.strip().strip("*_`").strip().removesuffix(".").strip()
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = _SPACING.sub(" ", text)
    text = _WORDS_ONLY.sub(r" \1 ", text).strip()
    text = _ASSIGNED.sub("", _PERCENT.sub("%", text))
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    for _ in range(3):  # fractions in fractions
        text = _FRACTION.sub(_ratio, text)
    return " ".join(text.split())


def _full_fraction(found: re.Match[str]) -> str:
    top, bottom = found[1] or found[3] or found[5] or "", found[2] or found[4] or found[6] or ""
    return f"\\frac{{{top}}}{{{bottom}}}"


def _ratio(found: re.Match[str]) -> str:
    top, bottom = (part.strip() if _PLAIN.fullmatch(part.strip()) else f"({part})" for part in found.groups())
    return f"{top}/{bottom}"


def _percentages(text: str) -> tuple[str, ...]:
    """Return the texts of which one has to match: a percentage is its number, and a hundredth of it."""
    if not text.endswith("%"):
        return (text,)
    number = _number(text[:-1].strip())
    return (text[:-1].strip(), str(number / 100)) if number is not None else (text,)


def _value(text: str, depth: int) -> Value:
    text = text.strip()
    number = _number(text)
    if number is not None:
        return number
    if len(text) >= 2 and (text[0] in "([{" and text[-1] in ")]}") and depth < _DEEPEST:
        inner = text[1:-1]
        items = _split(inner)
        if items is not None:
            if len(items) == 1 and (text[0], text[-1]) == ("(", ")"):
                return _value(items[0], depth + 1)
            return Listed(text[0], tuple(_value(item, depth + 1) for item in items), text[-1])
    if depth < _DEEPEST and (items := _split(text)) is not None and len(items) > 1:
        return Listed("", tuple(_value(item, depth + 1) for item in items), "")
    return "".join(text.split()).casefold()


def _split(text: str) -> list[str] | None:
    """Return the parts between the commas that are in no bracket; None when brackets do not match."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif character in ",;" and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if depth == 0 else None


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    if not _NO_UNITS.search(text):
        text = _UNIT.sub("", text)
    if mixed := _MIXED.fullmatch(text):
        whole, top, bottom = (int(mixed[group]) for group in (2, 3, 4))
        return _signed(mixed[1], Fraction(whole) + Fraction(top, bottom)) if bottom else None
    text = text.replace(" ", "")
    if text.startswith(("-(", "+(")) and text.endswith(")") and text.count("(") == 1:
        text = text[0] + text[2:-1]
    if plain := _PLAIN.fullmatch(text):
        value = _decimal(plain[2]) * Fraction(10) ** int(plain[3] or 0)
        return _signed(plain[1], value)
    if ratio := _RATIO.fullmatch(text):
        bottom_value = _decimal(ratio[3])
        return _signed(ratio[1], _decimal(ratio[2]) / bottom_value) if bottom_value else None
    if power := _POWER.fullmatch(text):
        return _power(power)
    return None


def _power(found: re.Match[str]) -> Fraction | None:
    """Return factor * base ^ exponent, or None when it is large."""
    base, exponent = int(found[3]), int(found[4] or found[5] or found[6])
    if base.bit_length() * abs(exponent) > _MOST_BITS or (base == 0 and exponent <= 0):
        return None
    return _signed(found[1], _decimal(found[2] or "1") * Fraction(base) ** exponent)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value
