"""Slow and plain definitions that cleaning is checked against."""

from __future__ import annotations

import re


def words_of(text: str) -> list[str]:
    """The words of a text of a language with spaces, in lower case."""
    return re.findall(r"\w+", text.lower())


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """The n-grams of words of a text, numbers all alike."""
    words = ["0" if word.isdigit() else word for word in words_of(text)]
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(left: str, right: str) -> float:
    """Similarity of the sets of 5-grams."""
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b) if a | b else 0.0


def cover(item: str, text: str, size: int = 8) -> float:
    """Share of an item's words in runs of `size` words that the text has too; all or nothing for shorter ones."""
    wanted, given = words_of(item), words_of(text)
    size = min(size, len(wanted))
    runs = {tuple(given[i : i + size]) for i in range(len(given) - size + 1)}
    covered = set()
    for i in range(len(wanted) - size + 1):
        if tuple(wanted[i : i + size]) in runs:
            covered.update(range(i, i + size))
    return len(covered) / len(wanted) if wanted else 0.0
