"""One row of the target: hypotheses added up by their next target token, and the realised token's exact share.

Shape legend: L hypotheses, T target tokens, M entries of a target row.
"""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Float32, Float64, Int32, Int64
from fusion_core.compiled import compiled
from fusion_core.sparse_row import place_of


@compiled
def write_row(
    t: int,
    nexts_L: Int32,
    masses_L: Float64,
    num: int,
    unlisted: float,
    keys: Int64,
    places: Int32,
    sums: Float64,
    ids_TM: Int32,
    probs_TM: Float32,
) -> tuple[int, float, float]:
    """Add up the hypotheses by their next target token; `unlisted` is the mass of all unlisted ids.

    Returns the number of entries, the tail, and the mass of all hypotheses. A full row leaves one place free.
    """
    width, num_entries, rest, mass = ids_TM.shape[1] - 1, 0, unlisted, unlisted
    for h in range(num):
        mass += masses_L[h]
        place = width
        if nexts_L[h] >= 0 and num_entries < width:
            place = place_of(keys, places, t, nexts_L[h], num_entries)
        if place == width:
            rest += masses_L[h]
        elif place == num_entries:
            ids_TM[t, place], sums[place] = nexts_L[h], masses_L[h]
            num_entries += 1
        else:
            sums[place] += masses_L[h]
    share = 1.0 / mass
    for m in range(num_entries):
        probs_TM[t, m] = sums[m] * share
    return num_entries, rest * share, mass


@compiled
def set_realised(
    t: int,
    target_id: int,
    realised: float,
    moved_from: int,
    moved: float,
    num_entries: int,
    tail: float,
    keys: Int64,
    places: Int32,
    ids_TM: Int32,
    probs_TM: Float32,
) -> float:
    """Give the realised target token its exact probability `realised`; return the new tail.

    Mass that is missing comes from the entry `moved_from`, onto which the realised source token was mapped, up to the
    probability `moved`, and then from the tail. Mass beyond `realised` goes to the tail.
    """
    width = ids_TM.shape[1] - 1
    place = min(place_of(keys, places, t, target_id, num_entries), num_entries)
    if place == num_entries:
        ids_TM[t, place] = target_id
        num_entries += 1
    needed = realised - probs_TM[t, place]
    if needed > 0.0 and moved > 0.0 and 0 <= moved_from != target_id:
        source_place = place_of(keys, places, t, moved_from, width)
        if source_place < width:
            taken = min(needed, moved, np.float64(probs_TM[t, source_place]))
            probs_TM[t, source_place] -= np.float32(taken)
            needed -= taken
    taken = min(needed, tail)
    needed -= taken
    probs_TM[t, place] = realised
    if needed > 0.0:  # rounding, or entries that had no place of their own
        others = probs_TM[t, :num_entries].sum() - probs_TM[t, place]
        for m in range(num_entries):
            if m != place:
                probs_TM[t, m] *= max(0.0, 1.0 - needed / max(others, 1e-30))
    return float(tail - taken)
