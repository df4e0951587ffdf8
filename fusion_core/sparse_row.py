"""Compiled functions for one sparse row: the place of an id in it, and its largest entries.

The place of an id is found in a small open-addressing table that stays in the nearest cache; a scratch row of the
vocabulary's size would miss it at every entry. Stamps make clearing between rows unnecessary.
"""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Float32, Int32, Int64
from fusion_core.compiled import compiled

_NUM_BUCKETS = 128
_EXPONENT_OF_ONE = 127


@compiled
def num_slots(max_entries: int) -> int:
    """Return the slots of a table for rows of at most `max_entries` entries: a power of two, sparsely filled."""
    slots = 16
    while slots < 4 * max_entries:
        slots *= 2
    return slots


@compiled
def place_of(keys: Int64, places: Int32, stamp: int, token_id: int, next_place: int) -> int:
    """Return the place of `token_id` in the row `stamp`; when it is new, that is `next_place`, which is remembered.

    `keys` (filled with -1 before the first row) and `places` have `num_slots` elements.
    """
    key = (np.int64(stamp) << 32) | token_id
    last = np.uint64(keys.shape[0] - 1)
    slot = np.uint64(token_id) & last
    while keys[slot] >> 32 == stamp:
        if keys[slot] == key:
            return int(places[slot])
        slot = (slot + np.uint64(1)) & last
    keys[slot], places[slot] = key, next_place
    return next_place


@compiled
def order_of_largest(sums: Float32, num_entries: int, k: int, bucket: Int32, order: Int32) -> int:
    """Write the indices of the k largest of num_entries probabilities to `order`, falling, ties in order of arrival.

    Returns their number, min(k, num_entries). A counting sort by the leading bits of the floating-point number
    comes close to the order without a branch that the processor has to guess; an insertion sort finishes it.
    """
    bits = sums.view(np.int32)
    count = np.zeros(_NUM_BUCKETS, dtype=np.int32)
    for m in range(num_entries):
        # Exponent and two bits of mantissa: four buckets per factor of two, from 1 down to 2^-32.
        bucket[m] = min(max((_EXPONENT_OF_ONE << 2) - (bits[m] >> 21), 0), _NUM_BUCKETS - 1)
        count[bucket[m]] += 1
    used, num_candidates = 0, 0
    while used < _NUM_BUCKETS and num_candidates < k:
        first = num_candidates
        num_candidates += count[used]
        count[used] = first
        used += 1
    for m in range(num_entries):
        if bucket[m] < used:
            order[count[bucket[m]]] = m
            count[bucket[m]] += 1
    for i in range(1, num_candidates):
        m, j = order[i], i
        while j > 0 and sums[order[j - 1]] < sums[m]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = m
    return min(k, num_entries)
