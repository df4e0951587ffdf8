"""Cuts documents into windows, and finds documents that repeat runs of each other's text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_WHITESPACE = np.zeros(256, dtype=np.bool_)
_WHITESPACE[list(b" \t\r\n\f\v")] = True
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_BYTE_CODES = np.random.default_rng(0).integers(1, 2**63, 256, dtype=np.uint64)


def cut(text: bytes, window_bytes: int) -> list[int]:
    """End offsets of the windows of a UTF-8 text: no longer than `window_bytes`, about equally long, in order.

    A cut lies just before a run of whitespace, so that words stay whole and the space goes with the word after it, as
    the tokenizers have it; where there is none within half a window, at a character boundary.
    """
    space = _WHITESPACE[np.frombuffer(text, dtype=np.uint8)]
    # Only up to the last word: a document's trailing whitespace is no window of its own.
    breaks = np.flatnonzero(space[1:] & ~space[:-1]) + 1
    breaks = breaks[breaks < len(text.rstrip())]
    ends: list[int] = []
    start = 0
    while len(text) - start > window_bytes:
        num_windows = -(-(len(text) - start) // window_bytes)
        ideal = start - (start - len(text)) // num_windows
        nearest, furthest = max(start + 1, ideal - window_bytes // 2), start + window_bytes
        candidates = breaks[np.searchsorted(breaks, nearest) : np.searchsorted(breaks, furthest, "right")]
        start = int(candidates[np.abs(candidates - ideal).argmin()]) if candidates.size else _character(text, ideal)
        ends.append(start)
    return [*ends, len(text)]


def _character(text: bytes, offset: int) -> int:
    """The last character boundary at or before `offset`."""
    while offset > 0 and text[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _run_hashes(text: bytes, run_bytes: int) -> npt.NDArray[np.uint64]:
    """Hashes of all runs of `run_bytes` bytes that begin with a word; equal runs have equal hashes."""
    # Polynomial hashes modulo 2^64: a run's hash is a difference of prefix sums, shifted back to its start.
    if len(text) < run_bytes:
        return np.zeros(0, dtype=np.uint64)
    array = np.frombuffer(text, dtype=np.uint8)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(text), _MULTIPLIER, dtype=np.uint64), dtype=np.uint64)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(_BYTE_CODES[array] * powers, dtype=np.uint64)))
        inverses = np.cumprod(np.full(len(text), _INVERSE, dtype=np.uint64), dtype=np.uint64)
        hashes = (sums[run_bytes:] - sums[:-run_bytes]) * inverses[: len(sums) - run_bytes]
    space = _WHITESPACE[array]
    begins = ~space & np.concatenate(([True], space[:-1]))
    result: npt.NDArray[np.uint64] = hashes[begins[: len(hashes)]]
    return result


def sharing(texts: Iterable[bytes], others: Iterable[bytes], run_bytes: int) -> list[bool]:
    """For each text: has it a run of `run_bytes` bytes, beginning with a word, in common with one of `others`?"""
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *(_run_hashes(other, run_bytes) for other in others)]))
    return [bool(np.isin(_run_hashes(text, run_bytes), known).any()) for text in texts]
