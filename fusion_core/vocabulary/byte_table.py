"""The bytes of every id, one behind the other, and the ids in order of their bytes.

Shape legend: V ids, B bytes of all ids together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from fusion_core.arrays import Int64, UInt8
from fusion_core.vocabulary.prefixes import prefix_ranges, sort_by_bytes


class ByteTable:
    """The bytes of ids 0..size-1; control tokens and holes in the numbering have none.

    Attributes:
        size: the number of ids, V.
        bytes_B, offsets_V1: the bytes of id i are bytes_B[offsets_V1[i]:offsets_V1[i + 1]].
        sorted_ids_V, rank_V: ids in order of their bytes (ties by id), and the place of every id in that order.
        prefix_low_B, prefix_high_B: ranks low..high-1 are the ids that start with the first n bytes of id i, stored
            at offsets_V1[i] + n - 1.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.size = len(token_bytes)
        self.bytes_B: UInt8 = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        lengths_V = np.fromiter(map(len, token_bytes), dtype=np.int64, count=self.size)
        self.offsets_V1: Int64 = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_V)])
        self.sorted_ids_V, self.rank_V = sort_by_bytes(token_bytes)
        self.prefix_low_B, self.prefix_high_B = prefix_ranges(
            self.bytes_B, self.offsets_V1, self.sorted_ids_V, int(lengths_V.max(initial=0))
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id; none for ids beyond the table (padded output layers)."""
        if not 0 <= token_id < self.size:
            return b""
        return self.bytes_B[self.offsets_V1[token_id] : self.offsets_V1[token_id + 1]].tobytes()

    def prefix_range(self, prefix: bytes) -> tuple[int, int]:
        """Return (low, high): exactly sorted_ids_V[low:high] start with `prefix`; all ids for the empty prefix."""
        if not prefix:
            return 0, self.size

        def head(rank: int) -> bytes:
            return self.token_bytes(int(self.sorted_ids_V[rank]))[: len(prefix)]

        low = bisect_left(range(self.size), prefix, key=head)
        high = bisect_left(range(self.size), 1, lo=low, key=lambda rank: int(head(rank) > prefix))
        return low, high

    def longest_prefix(self, text: bytes) -> int:
        """Return the longest of the ids whose bytes `text` starts with; -1 when there is none."""
        longest = -1
        for length in range(1, len(text) + 1):
            low, high = self.prefix_range(text[:length])
            if low == high:
                break
            shortest = int(self.sorted_ids_V[low])  # in byte order, a token equal to the prefix comes first
            if len(self.token_bytes(shortest)) == length:
                longest = shortest
        return longest
