"""Windows of a captured split by key: a file of sorted entries beside its shards, searched where it lies.

IDENTITY/captures/SPLIT/keys.sorted    for each window 16 bytes of key and 8 bytes of index (big-endian), by rising key

A replica that looks up a key reads a few kilobytes of the file, whatever the size of the split, and holds nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from services.base.files import Files
from services.store.identity import KEY_BYTES

KEYS = "keys.sorted"
_INDEX_BYTES = 8
_ENTRY_BYTES = KEY_BYTES + _INDEX_BYTES
_READ_ENTRIES = 512
"""Number of entries that are read at once: 12 kB."""
_GUESSES = 4
_VALUE_BITS = 64


def sorted_keys(keys: bytes) -> bytes:
    """Return the file's contents for the keys of a split's windows, one after the other by rising index."""
    keys_NB = np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
    indices_N = np.arange(len(keys_NB), dtype=">u8")
    halves_N2 = keys_NB.copy().view(">u8")
    order_N = np.lexsort((halves_N2[:, 1], halves_N2[:, 0]))
    entries_NB = np.hstack([keys_NB, indices_N.view(np.uint8).reshape(-1, _INDEX_BYTES)])
    data: bytes = entries_NB[order_N].tobytes()
    return data


def has_keys(files: Files, folder: str) -> bool:
    """Return whether a captured split has the file."""
    try:
        files.open(f"{folder}/{KEYS}").close()
    except FileNotFoundError:
        return False
    return True


def write_keys(files: Files, folder: str, data: bytes) -> None:
    """Write the file of a captured split."""
    files.write(f"{folder}/{KEYS}", data)


def read_keys(files: Files, folder: str) -> bytes | None:
    """Return the whole file; None when there is none."""
    return files.read(f"{folder}/{KEYS}")


def find_key(files: Files, folder: str, key: bytes) -> int | None:
    """Return the index of the window with a key in a captured split; None when it has none, or has no such file.

    Keys are hashes, evenly spread, so that their values tell their places: two or three reads find one of 10^8.
    Where they are not, later steps halve the remaining range. Raises one of `UNREADABLE` for a damaged file.
    """
    try:
        file = files.open(f"{folder}/{KEYS}")
    except FileNotFoundError:
        return None
    with file:
        low, high = 0, file.size() // _ENTRY_BYTES
        wanted, num_keys, steps = _value(key), high, 0
        guess = (wanted * num_keys) >> _VALUE_BITS
        while low < high:
            first = min(max(low, guess - _READ_ENTRIES // 2), max(low, high - _READ_ENTRIES))
            entries = _entries(file, first, min(_READ_ENTRIES, high - first))
            at = bisect_left(entries, key)
            if at < len(entries) and entries[at][:KEY_BYTES] == key:
                return int.from_bytes(entries[at][KEY_BYTES:], "big")
            if 0 < at < len(entries):
                return None
            if at == 0:
                high = first
            else:
                low = first + len(entries)
            steps += 1
            nearby = first + (((wanted - _value(entries[0])) * num_keys) >> _VALUE_BITS)
            guess = min(max(nearby, low), high) if steps < _GUESSES else (low + high) // 2
    return None


def _value(key: bytes) -> int:
    return int.from_bytes(key[: _VALUE_BITS // 8], "big")


def _entries(file: Any, first: int, count: int) -> list[bytes]:
    file.seek(first * _ENTRY_BYTES)
    data: bytes = file.read(count * _ENTRY_BYTES)
    return [data[at : at + _ENTRY_BYTES] for at in range(0, len(data), _ENTRY_BYTES)]
