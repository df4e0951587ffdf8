"""Prompts that are held out, found again in training data by runs of words in common."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_RUN = 8


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


class HeldOutPrompts:
    """The held-out prompts, by their runs of eight words; a shorter prompt has one run, all of its words.

    A text holds a prompt when runs that both have cover `share` of the prompt's words. A prompt of fewer than eight
    words is found only in a text that says just the same.
    """

    def __init__(self, prompts: Iterable[str], *, share: float) -> None:
        self._share = share
        self._whole: set[tuple[str, ...]] = set()
        self._lengths: list[int] = []
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for prompt in prompts:
            words = words_of(prompt)
            self._whole.add(tuple(words) if words else (prompt,))
            if len(words) >= _RUN:
                for place in range(len(words) - _RUN + 1):
                    run = tuple(words[place : place + _RUN])
                    self._places.setdefault(run, []).append((len(self._lengths), place))
                self._lengths.append(len(words))

    def found_in(self, text: str) -> bool:
        """Return whether the text holds one of the prompts."""
        words = words_of(text)
        if (tuple(words) if words else (text,)) in self._whole:
            return True
        covered: dict[int, set[int]] = {}
        for start in range(len(words) - _RUN + 1):
            for prompt, place in self._places.get(tuple(words[start : start + _RUN]), ()):
                covered.setdefault(prompt, set()).update(range(place, place + _RUN))
        return any(len(places) >= self._share * self._lengths[prompt] for prompt, places in covered.items())
