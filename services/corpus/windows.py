"""Cut documents into windows at places that suit every tokenizer involved.

A cut that is a token boundary of the whole document for all of them changes nobody's tokens: each model reads in its
windows what it would read in the document. Such places are taken first, those before a word in front of others.

Shape legend: N bytes of a document, T tokens of one tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Int64
from fusion_core.vocabulary import Encoding, Vocabulary
from services.models.chat_tokenizer import ChatTokenizer

WHITESPACE = np.zeros(256, dtype=np.bool_)
"""True at the byte values that are white space."""
WHITESPACE[list(b" \t\r\n\f\v")] = True
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)
"""A character that is neither white space nor of zero width."""
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Reader:
    """A model that the windows are for.

    Attributes:
        name: as messages name it.
        vocabulary: its tokenizer.
        max_tokens: longest input in tokens, EOS included, BOS not; None for no limit.
        reads_context: whether the left context is part of the input.
        chat: how the model reads conversations; None where it reads the words of a turn alone.
        is_target: whether this is the model that learns.
    """

    name: str
    vocabulary: Vocabulary
    max_tokens: int | None
    reads_context: bool
    chat: ChatTokenizer | None = None
    is_target: bool = False


@dataclass(frozen=True, slots=True)
class PlannedWindow:
    """Bytes start..end-1 of a document, to be read with context_start..start-1 before them.

    Attributes:
        at_boundary: whether the window starts at a token boundary of the whole document for every reader.
        shortened: whether the context is shorter than asked for, so that both fit a reader.
        blank: whether the window holds nothing but white space and characters of zero width; no reader learns from it.
    """

    start: int
    end: int
    context_start: int
    at_boundary: bool
    shortened: bool
    blank: bool


def plan_windows(
    texts: Sequence[bytes], window_bytes: int, context_bytes: int = 0, readers: Sequence[Reader] = ()
) -> list[list[PlannedWindow]]:
    """Return the windows of every document, UTF-8: at most `window_bytes` long, about equally long, within every limit.

    A window is blank only where white space fills it, and is read as no other window's context. A window of which some
    tokenizer would keep nothing is joined to a neighbour where both fit.

    Raises ValueError naming the reader for which even a single character is too long.
    """
    encodings = [reader.vocabulary.encode_batch(texts) for reader in readers]
    return [
        _Document(text, [encoding[index] for encoding in encodings], readers).plan(window_bytes, context_bytes)
        for index, text in enumerate(texts)
    ]


class _Document:
    """The places at which a document can be cut, best ones first."""

    def __init__(self, text: bytes, encodings: Sequence[Encoding], readers: Sequence[Reader]) -> None:
        self._text, self._readers = text, readers
        text_N = np.frombuffer(text, dtype=np.uint8)
        space_N = WHITESPACE[text_N]
        # The space goes with the word after it, as the tokenizers have it. Only up to the last word: a document's
        # trailing whitespace is no window of its own.
        before_word = np.flatnonzero(space_N[1:] & ~space_N[:-1]) + 1
        before_word = before_word[before_word < len(text.rstrip())]
        self._shared_N = (text_N & 0xC0) != 0x80
        for encoding in encodings:
            boundary_N = np.zeros(len(text) + 1, dtype=np.bool_)
            boundary_N[encoding.byte_ends_T[encoding.lossless_T]] = True
            self._shared_N &= boundary_N[:-1]
        self._places: list[Int64] = [before_word]
        if encodings:
            self._places = [before_word[self._shared_N[before_word]], np.flatnonzero(self._shared_N), before_word]
        self._ends = [encoding.byte_ends_T for encoding in encodings]
        self._limits = [
            (encoding.byte_ends_T, reader.max_tokens - 1)  # one is kept for EOS
            for encoding, reader in zip(encodings, readers, strict=True)
            if reader.max_tokens is not None
        ]

    def plan(self, window_bytes: int, context_bytes: int) -> list[PlannedWindow]:
        ends = self._fitting(0, len(self._text), window_bytes)
        planned: list[PlannedWindow] = []
        read_from = 0  # behind the last blank window
        for start, end in self._joined(list(zip([0, *ends], ends, strict=False)), window_bytes):
            context_start = wanted = max(self._context(start, context_bytes), read_from)
            while context_start < start and self._too_long(start, end, context_start):
                context_start = max(self._context(start, (start - context_start) // 2), read_from)
            shared = start == 0 or bool(self._shared_N[start])
            blank = not self._has(_VISIBLE, start, end)
            planned.append(PlannedWindow(start, end, context_start, shared, context_start != wanted, blank))
            read_from = end if blank else read_from
        return planned

    def _joined(self, spans: list[tuple[int, int]], window_bytes: int) -> list[tuple[int, int]]:
        """Join a window without a token for some reader to the next window, or to the one before, where both fit."""
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            before = joined[-1] if joined else None
            if (
                before is not None
                and end - before[0] <= window_bytes
                and (self._keeps_nothing(*before) or self._keeps_nothing(start, end))
                and self._too_long(before[0], end, before[0]) is None
            ):
                joined[-1] = before[0], end
            else:
                joined.append((start, end))
        return joined

    def _keeps_nothing(self, start: int, end: int) -> bool:
        """Return whether a window is blank, or some reader has no token in it."""
        if not self._has(_VISIBLE, start, end):
            return True
        if any(np.subtract(*np.searchsorted(ends_T, [end, start], side="right")) == 0 for ends_T in self._ends):
            return True
        if self._has(_LETTER_OR_DIGIT, start, end):
            return False
        return any(not reader.vocabulary.encode(self._text[start:end]).num_tokens for reader in self._readers)

    def _has(self, characters: re.Pattern[str], start: int, end: int) -> bool:
        return characters.search(self._text[start:end].decode()) is not None

    def _fitting(self, start: int, end: int, window_bytes: int) -> list[int]:
        """Return the end offsets of the windows of [start, end), each within every reader's limit."""
        ends: list[int] = []
        for stop in self._cut(start, end, window_bytes):
            if reader := self._too_long(start, stop, start):
                if stop - start <= 4 and len(self._text[start:stop].decode()) == 1:
                    raise ValueError(f"{reader.name}.max_tokens: {reader.max_tokens} do not hold a single character")
                ends += self._fitting(start, stop, -(-(stop - start) // 2))
            else:
                ends.append(stop)
            start = stop
        return ends

    def _cut(self, start: int, end: int, window_bytes: int) -> list[int]:
        ends: list[int] = []
        while True:
            furthest, num_windows = start + window_bytes, -(-(end - start) // window_bytes)
            for ends_T, limit in self._limits:
                first, last = np.searchsorted(ends_T, [start, end], side="right")
                if first + limit < last:
                    furthest = min(furthest, int(ends_T[first + max(1, limit) - 1]))
                    num_windows = max(num_windows, int(-(-(last - first) // max(1, limit))))
            if furthest >= end:
                return [*ends, end]
            ideal = min(start - (start - end) // num_windows, furthest)
            start = self._best(max(start + 1, ideal - window_bytes // 2), min(furthest, end - 1), ideal, start)
            if start == end:
                return [*ends, end]
            ends.append(start)

    def _best(self, nearest: int, furthest: int, ideal: int, start: int) -> int:
        """Return the place closest to `ideal`, of the best kind that there is from `nearest` to `furthest`."""
        for places in self._places:
            found = places[np.searchsorted(places, nearest) : np.searchsorted(places, furthest, "right")]
            if found.size:
                return int(found[np.abs(found - ideal).argmin()])
        return self._character(ideal, start)

    def _character(self, offset: int, start: int) -> int:
        """Return the last character boundary at or before `offset`, or the first one behind `start`."""
        text, at = self._text, offset
        while at > start and text[at] & 0xC0 == 0x80:
            at -= 1
        if at > start:
            return at
        at = start + 1
        while at < len(text) and text[at] & 0xC0 == 0x80:
            at += 1
        return at

    def _context(self, start: int, context_bytes: int) -> int:
        """Return the offset at which the left context of a window begins: `start` for none."""
        first = max(0, start - context_bytes)
        if first in {0, start}:
            return first
        return self._best(first, min(first + context_bytes // 2, start - 1), first, first - 1)

    def _too_long(self, start: int, end: int, context_start: int) -> Reader | None:
        """Return the reader for which context and window are too long."""
        for reader in self._readers:
            before = start - context_start if reader.reads_context else 0
            # No token is shorter than a byte; dummy prefix and EOS come on top.
            if reader.max_tokens is None or before + end - start + 2 <= reader.max_tokens:
                continue
            text, num_tokens = self._text[start:end], 1
            if before:
                num_tokens += reader.vocabulary.encode(self._text[context_start:start]).num_tokens
            num_tokens += reader.vocabulary.encode_batch([text], continues=bool(before))[0].num_tokens
            if num_tokens > reader.max_tokens:
                return reader
        return None
