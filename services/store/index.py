"""An index from the key of a window to its shard and row: 16 bytes of memory a window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_core.arrays import Int64, UInt64

_RECENT = 1 << 16
_ROW_BITS = 32

Part = tuple[UInt64, Int64]
"""Key prefixes in rising order, and shard and row of each as one number."""


class KeyIndex:
    """Map keys to shard numbers and rows by the first 8 bytes of a key; the reader compares the whole key.

    Two sorted arrays: new keys go to the small one, which is merged into the large one when it is full.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = [(np.empty(0, np.uint64), np.empty(0, np.int64)) for _ in range(2)]

    def __len__(self) -> int:
        return sum(len(prefixes) for prefixes, _ in self._parts)

    def add(self, shard: int, keys: Sequence[bytes]) -> None:
        prefixes = np.frombuffer(b"".join(key[:8] for key in keys), dtype=">u8").astype(np.uint64)
        places = (shard << _ROW_BITS) + np.arange(len(keys), dtype=np.int64)
        large, small = self._parts
        small = _merged(small, (prefixes, places))
        self._parts = [_merged(large, small), (prefixes[:0], places[:0])] if len(small[0]) > _RECENT else [large, small]

    def find(self, key: bytes) -> list[tuple[int, int]]:
        """Return shard and row of every window that may have this key, the newest first."""
        prefix = np.uint64(int.from_bytes(key[:8], "big"))
        found = []
        for prefixes, places in reversed(self._parts):
            start, end = np.searchsorted(prefixes, prefix, "left"), np.searchsorted(prefixes, prefix, "right")
            found += [divmod(int(place), 1 << _ROW_BITS) for place in places[start:end][::-1]]
        return found


def _merged(one: Part, other: Part) -> Part:
    prefixes, places = np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])
    order = np.argsort(prefixes, kind="stable")
    return prefixes[order], places[order]
