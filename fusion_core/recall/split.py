"""Split a text into blocks of few tokens that end where sentences do (CogLTX, Ding et al. 2020, section 3).

The cuts minimise `BLOCK_COST` per block plus the cost of every cut, found by dynamic programming over all ends of
tokens: O(tokens * max_tokens). The blocks tile the text: joined, they are the text, whatever it holds.

Shapes: T tokens, C characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.compiled import compiled

BLOCK_COST = 4
"""The cost of one more block."""
NEWLINE, SENTENCE, CLAUSE, WORD, INSIDE_WORD = 0, 1, 2, 8, 16
"""Costs of a cut: after the end of a line, of a sentence, of a clause, of a word, and within a word."""

_SENTENCE_ENDS, _WIDE_SENTENCE_ENDS = ".?!", "。！？．｡…‥।؟"
_CLAUSE_ENDS, _WIDE_CLAUSE_ENDS = ",;:", "，、；：､،؛"
_CLOSING = "\"'”’»)]}」』】》〉）］｝"
_NO_SPACES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""First and last code points of scripts that are written without spaces: kana and Chinese characters."""


@dataclass(frozen=True, slots=True)
class Span:
    """A block of a text: `text[start:end]`, offsets in characters, and the number of its tokens."""

    start: int
    end: int
    tokens: int


def split(text: str, token_ends: Sequence[int] | NDArray[np.integer], max_tokens: int = 63) -> list[Span]:
    """Return the blocks of a text, in its order.

    Args:
        text: any text. The empty one has no block.
        token_ends: end offset of every token in characters, ascending, as a fast tokenizer gives them; tokens of one
            character that took several may share an end.
        max_tokens: tokens of a block at most.

    Raises ValueError when the ends are no offsets of the text, or when one character has more than `max_tokens` tokens.
    """
    ends_T = np.asarray(token_ends, dtype=np.int64)
    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be at least 1, got {max_tokens}")
    if ends_T.ndim != 1 or (len(ends_T) and (ends_T[0] < 0 or ends_T[-1] > len(text) or np.any(np.diff(ends_T) < 0))):
        raise ValueError(f"token_ends: must ascend from 0 to at most the {len(text)} characters of the text")
    if not len(ends_T):
        return [Span(0, len(text), 0)] if text else []
    cuts_T, costs_T = _cuts(text, ends_T)
    last_tokens = _cheapest(costs_T, max_tokens)
    if last_tokens is None:
        raise ValueError(f"max_tokens: one character of the text has more than {max_tokens} tokens")
    bounds = [0, *cuts_T[last_tokens[:-1]].tolist(), len(text)]
    tokens = np.diff(last_tokens, prepend=-1).tolist()
    return [Span(start, end, count) for start, end, count in zip(bounds, bounds[1:], tokens, strict=False)]


def _cuts(text: str, ends_T: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return place and cost of the cut after every token; -1 is the cost of a cut that cannot be made.

    A cut lies behind the white space that follows the token, unless that space is a token itself.
    """
    code_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes, at_C = np.unique(code_C, return_inverse=True)
    kinds = [_kind(chr(code)) for code in codes.tolist()]
    space_C = np.array([kind[0] for kind in kinds])[at_C]
    word_C = np.array([kind[1] for kind in kinds])[at_C]
    ending_C = np.array([kind[2] for kind in kinds])[at_C]
    closing_C = np.isin(code_C, _codes(_CLOSING))
    places = np.arange(len(text) + 1)
    # The next character that is no space, from every character on; and the last one that neither is nor closes.
    next_C = np.minimum.accumulate(np.append(np.where(space_C, len(text), places[:-1]), len(text))[::-1])[::-1]
    said_C = np.maximum.accumulate(np.where(space_C | closing_C, -1, places[:-1]))
    lines_C = np.append(0, np.cumsum(code_C == ord("\n")))

    following_T = np.append(ends_T[1:], len(text) + 1)
    cuts_T = np.where(next_C[ends_T] < following_T, next_C[ends_T], ends_T)
    before_T = np.maximum(ends_T - 1, 0)
    spaced_T = (
        (cuts_T > ends_T) | space_C[before_T] | (cuts_T >= len(text)) | space_C[np.minimum(cuts_T, len(text) - 1)]
    )
    split_word_T = ~spaced_T & word_C[before_T] & word_C[np.minimum(cuts_T, len(text) - 1)]
    costs_T = np.where(split_word_T, INSIDE_WORD, WORD)
    ending_T = np.where(said_C[before_T] >= 0, ending_C[said_C[before_T]], 0)
    # Narrow marks end something only before a space ("3.5" is one number); wide ones are negative and always do.
    mark_T = np.where(ending_T < 0, -ending_T, np.where(spaced_T, ending_T, 0))
    costs_T = np.where(mark_T > 0, mark_T, costs_T)
    costs_T = np.where(lines_C[cuts_T] > lines_C[before_T], NEWLINE, costs_T)
    costs_T[ends_T == following_T] = -1
    costs_T[ends_T == 0] = -1
    costs_T[-1] = 0
    return cuts_T, costs_T.astype(np.int64)


def _kind(character: str) -> tuple[bool, bool, int]:
    """Return whether a character is a space, whether it belongs to a word, and the cost of a cut behind it, 0 for none.

    The cost is negative for wide punctuation, which ends something without a space behind it.
    """
    cost = 0
    for marks, value in (
        (_SENTENCE_ENDS, SENTENCE), (_CLAUSE_ENDS, CLAUSE),
        (_WIDE_SENTENCE_ENDS, -SENTENCE), (_WIDE_CLAUSE_ENDS, -CLAUSE),
    ):  # fmt: skip
        if character in marks:
            cost = value
    spaceless = any(first <= ord(character) <= last for first, last in _NO_SPACES)
    return character.isspace(), character.isalnum() and not spaceless, cost


def _codes(characters: str) -> ArrayLike:
    return [ord(character) for character in characters]


def _cheapest(costs_T: NDArray[np.int64], max_tokens: int) -> NDArray[np.int64] | None:
    """Return the last token of every block; None where a block of at most `max_tokens` tokens cannot be cut."""
    previous_T = _previous(costs_T, max_tokens)
    last = len(costs_T) - 1
    chosen = []
    while last >= 0:
        chosen.append(last)
        if previous_T[last] == -2:
            return None
        last = int(previous_T[last])
    return np.array(chosen[::-1], dtype=np.int64)


@compiled
def _previous(costs_T: NDArray[np.int64], max_tokens: int) -> NDArray[np.int64]:
    """Return for every token the last token of the block before the one that it ends: -1 the start, -2 no way."""
    total_T = np.zeros(len(costs_T), dtype=np.int64)
    previous_T = np.full(len(costs_T), -2, dtype=np.int64)
    for token in range(len(costs_T)):
        if costs_T[token] < 0:
            continue
        for before in range(token - 1, max(token - max_tokens, -1) - 1, -1):
            if before >= 0 and previous_T[before] == -2:
                continue
            total = costs_T[token] + BLOCK_COST + (total_T[before] if before >= 0 else 0)
            if previous_T[token] == -2 or total < total_T[token]:
                total_T[token], previous_T[token] = total, before
    return previous_T
