"""Find runs of text that documents have in common, so that neither split repeats the other's text.

Shape legend: H hashes of runs of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.arrays import UInt8, UInt64
from services.corpus.windows import WHITESPACE

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_BYTE_CODES = np.random.default_rng(0).integers(1, 2**63, 256, dtype=np.uint64)
_TABLE_SLOTS_PER_HASH = 8
_MOST_TABLE_BITS = 31
_3, _7 = np.uint64(3), np.uint64(7)
_RANGE_HASHES = 1 << 18
"""Number of hashes that are merged at once, in about 50 bytes of memory each."""
_HASHES, _TABLE = "known-runs", "known-runs-table"


def run_hashes(text: bytes, run_bytes: int) -> UInt64:
    """Return hashes of all runs of `run_bytes` bytes that begin with a word; equal runs have equal hashes."""
    # Polynomial hashes modulo 2^64: a run's hash is a difference of prefix sums, shifted back to its start.
    if len(text) < run_bytes:
        return np.zeros(0, dtype=np.uint64)
    array = np.frombuffer(text, dtype=np.uint8)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(text), _MULTIPLIER, dtype=np.uint64), dtype=np.uint64)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(_BYTE_CODES[array] * powers, dtype=np.uint64)))
        inverses = np.cumprod(np.full(len(text), _INVERSE, dtype=np.uint64), dtype=np.uint64)
        hashes = (sums[run_bytes:] - sums[:-run_bytes]) * inverses[: len(sums) - run_bytes]
    space = WHITESPACE[array]
    begins = ~space & np.concatenate(([True], space[:-1]))
    result: UInt64 = hashes[begins[: len(hashes)]]
    return result


class RunTable:
    """A set of hashes of runs. It lies on disk, where all processes of a machine share its memory.

    Looking up takes time in proportion to the text alone: a table over some bits of the hashes answers nearly every
    run, and only a run that the table knows is looked up among the sorted hashes.
    """

    def __init__(self, known_H: UInt64, table: UInt8) -> None:
        self._known_H, self._table = known_H, table
        self._shift = _shift(table)

    @classmethod
    def of(cls, hashes_H: UInt64) -> RunTable:
        """Return the set of some hashes, in any order."""
        known_H = np.unique(hashes_H)
        table = _empty_table(len(known_H))
        _enter(table, known_H)
        return cls(known_H, table)

    @classmethod
    def merge(cls, files: Sequence[Path], folder: Path) -> None:
        """Write to a folder the set of the hashes in some sorted files; a range of them at a time is in memory."""
        parts = [_mapped(file, np.uint64) for file in files]
        num_hashes = sum(map(len, parts))
        num_ranges = -(-num_hashes // _RANGE_HASHES)
        table = _empty_table(num_hashes)
        with (folder / _HASHES).open("wb") as file:
            for number in range(num_ranges):
                edges = [np.uint64((2**64 * n) // num_ranges) for n in (number, number + 1) if n < num_ranges]
                ends = [[*np.searchsorted(part, edges), len(part)][:2] for part in parts]
                ranges = [part[start:end] for part, (start, end) in zip(parts, ends, strict=True)]
                known_H = np.unique(np.concatenate(ranges))
                _enter(table, known_H)
                file.write(known_H.data)
        (folder / _TABLE).write_bytes(table.data)

    @classmethod
    def open(cls, folder: Path) -> RunTable:
        """Return the set in a folder, mapped into memory."""
        return cls(_mapped(folder / _HASHES, np.uint64), _mapped(folder / _TABLE, np.uint8))

    def holds(self, hashes_H: UInt64) -> bool:
        """Return whether any of the hashes is in the set."""
        slots_H = hashes_H >> self._shift
        hashes_H = hashes_H[(self._table[slots_H >> _3] >> (slots_H & _7).astype(np.uint8) & 1).astype(np.bool_)]
        if not hashes_H.size:
            return False
        places_H = np.minimum(np.searchsorted(self._known_H, hashes_H), len(self._known_H) - 1)
        return bool((self._known_H[places_H] == hashes_H).any())


def _mapped(path: Path, dtype: type[np.generic]) -> Any:
    """Return the array in a file, mapped into memory."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _empty_table(num_hashes: int) -> UInt8:
    """Return a bit for each slot of a table, eight in a byte."""
    bits = min(_MOST_TABLE_BITS, max(3, (num_hashes * _TABLE_SLOTS_PER_HASH).bit_length()))
    return np.zeros(1 << bits - 3, dtype=np.uint8)


def _enter(table: UInt8, hashes_H: UInt64) -> None:
    slots_H = hashes_H >> _shift(table)
    np.bitwise_or.at(table, slots_H >> _3, np.left_shift(np.uint64(1), slots_H & _7).astype(np.uint8))


def _shift(table: UInt8) -> np.uint64:
    """Return the number of low bits of a hash that the table does not look at."""
    return np.uint64(64 - (len(table).bit_length() - 1) - 3)


def sharing(texts: Iterable[bytes], others: Iterable[bytes], run_bytes: int) -> list[bool]:
    """Return for each text whether it shares with `others` a run of `run_bytes` bytes that begins with a word."""
    table = RunTable.of(np.concatenate([np.zeros(0, np.uint64), *(run_hashes(other, run_bytes) for other in others)]))
    return [table.holds(run_hashes(text, run_bytes)) for text in texts]
