r"""Find the final answer of a worked solution: `\boxed{...}`, `#### ...`, "the answer is ...", or the last number.

Of several of one kind the last counts: a solution may correct itself. Time is linear in the text.
"""

from __future__ import annotations

import re
from collections import deque

_BOXES = re.compile(r"\\(?:boxed|fbox)\s*")
_ANNOUNCED = re.compile(r"\banswer(?:\s+is\b|\s+to\b[^.\n=:]{0,100}\bis\b|\s*[:=])[ \t]*:?[ \t]*", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_MOST_BOXES = 8
"""Boxes that are looked at, from the last one back, until one is closed."""
_TAIL_CHARACTERS = 4096
"""Longest final answer that is looked for, and the end of the text in which the last number is looked for."""


def final_answer(text: str) -> str | None:
    """Return the final answer as it is written, or None when the text has none."""
    for found in (_boxed(text), _after_hashes(text), _announced(text), _last_number(text)):
        if found is not None and found.strip():
            return found.strip()
    return None


def _boxed(text: str) -> str | None:
    end = len(text)
    for _ in range(_MOST_BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        opening = _BOXES.match(text, start)
        if opening and (content := _braced(text, opening.end())) is not None:
            return content
        end = start
    return None


def _braced(text: str, at: int) -> str | None:
    """Return what is between the brace at `at` and the one that closes it; without a brace the next word."""
    window = text[at : at + _TAIL_CHARACTERS]
    if not window.startswith("{"):
        words = window.split(maxsplit=1)
        return words[0].strip("$.,;") if words else None
    depth = 0
    for place, character in enumerate(window):
        if character == "{" and not (place and window[place - 1] == "\\"):
            depth += 1
        elif character == "}" and window[place - 1] != "\\":
            depth -= 1
            if depth == 0:
                return window[1:place]
    return None


def _after_hashes(text: str) -> str | None:
    """Return the rest of the line behind the last `####`, as in GSM8K."""
    _, mark, rest = text.rpartition("####")
    return rest.lstrip(" \t#").split("\n", 1)[0] if mark else None


def _announced(text: str) -> str | None:
    found = deque(_ANNOUNCED.finditer(text), maxlen=1)
    if not found:
        return None
    rest = text[found[0].end() : found[0].end() + _TAIL_CHARACTERS].lstrip("*_ \t")
    if not rest.strip():
        return None
    line = rest.lstrip("\n").split("\n", 1)[0]
    ending = _SENTENCE_END.search(line)
    return (line[: ending.start()] if ending else line).strip("*_ \t.")


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text[-_TAIL_CHARACTERS:])
    return numbers[-1].rstrip(",") if numbers else None
