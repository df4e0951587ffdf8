"""Ids in order of their bytes: the tokens that start with the same bytes are neighbours.

Shape legend: V ids, B bytes of all ids together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_core.arrays import Int32, Int64, UInt8
from fusion_core.compiled import compiled


def sort_by_bytes(token_bytes: Sequence[bytes]) -> tuple[Int32, Int32]:
    """Return (sorted_ids_V, rank_V): ids in order of their bytes, ties by id, and the place of every id in it."""
    sorted_ids_V = np.array(sorted(range(len(token_bytes)), key=token_bytes.__getitem__), dtype=np.int32)
    rank_V = np.empty_like(sorted_ids_V)
    rank_V[sorted_ids_V] = np.arange(len(token_bytes), dtype=np.int32)
    return sorted_ids_V, rank_V


@compiled
def prefix_ranges(bytes_B: UInt8, offsets_V1: Int64, sorted_ids_V: Int32, longest: int) -> tuple[Int32, Int32]:
    """Return (low_B, high_B): ranks low..high-1 start with token x's first n bytes, stored at offsets_V1[x] + n - 1.

    One pass over the sorted ids in each direction: a prefix of n bytes is shared with the neighbour exactly when the
    two have at least n leading bytes in common.
    """
    num_ids = sorted_ids_V.shape[0]
    shared_V = np.zeros(num_ids + 1, dtype=np.int32)
    for rank in range(1, num_ids):
        left, right = sorted_ids_V[rank - 1], sorted_ids_V[rank]
        limit = min(offsets_V1[left + 1] - offsets_V1[left], offsets_V1[right + 1] - offsets_V1[right])
        n = 0
        while n < limit and bytes_B[offsets_V1[left] + n] == bytes_B[offsets_V1[right] + n]:
            n += 1
        shared_V[rank] = n
    low_B, high_B = np.empty(bytes_B.shape[0], dtype=np.int32), np.empty(bytes_B.shape[0], dtype=np.int32)
    bound = np.zeros(longest + 1, dtype=np.int32)
    for rank in range(num_ids):
        token = sorted_ids_V[rank]
        for n in range(1, offsets_V1[token + 1] - offsets_V1[token] + 1):
            if n > shared_V[rank]:
                bound[n] = rank
            low_B[offsets_V1[token] + n - 1] = bound[n]
    for rank in range(num_ids - 1, -1, -1):
        token = sorted_ids_V[rank]
        for n in range(1, offsets_V1[token + 1] - offsets_V1[token] + 1):
            if n > shared_V[rank + 1]:
                bound[n] = rank + 1
            high_B[offsets_V1[token] + n - 1] = bound[n]
    return low_B, high_B
