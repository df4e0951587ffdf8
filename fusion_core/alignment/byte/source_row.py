"""One row of the source: its ids as hypotheses, all of them or those that reach a position of the text.

Ids of a row that are neither candidates nor realised are unlisted: their number and their mass together are known, so
each counts as an equal share of it.

Shape legend: as in `columns`; L room for hypotheses.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.byte.columns import Record, SourceRows, SourceTables, TextInBoth
from fusion_core.alignment.byte.hypotheses import LOWEST_PROBABILITY, Hypotheses, room_for
from fusion_core.arrays import Float32, Float64, Int32, Int64, UInt8
from fusion_core.compiled import compiled


@compiled
def add_row(
    ids_RK: Int32,
    probs_RK: Float32,
    row: int,
    tail: float,
    gold: float,
    realised: int,
    size: int,
    num: int,
    ids_L: Int32,
    masses_L: Float64,
) -> tuple[int, float, int]:
    """Add the listed ids of a row behind the first `num` hypotheses, the realised one first, with its exact mass.

    Returns the new number of hypotheses, and mass and number of all unlisted ids. The masses together are one. A place
    that holds no candidate becomes id -1 with mass zero.
    """
    gold = max(gold, LOWEST_PROBABILITY)
    ids_L[num], masses_L[num] = realised, gold
    num_inside, listed, is_candidate = 1, 0.0, False
    for j in range(ids_RK.shape[1]):
        x = ids_RK[row, j]
        is_realised = x == realised
        is_candidate |= is_realised
        counts = x >= 0 and not is_realised
        ids_L[num + 1 + j] = x if counts else -1
        masses_L[num + 1 + j] = probs_RK[row, j] if counts else np.float32(0.0)
        listed += masses_L[num + 1 + j]
        num_inside += counts and x < size
    unlisted = tail if is_candidate else max(0.0, tail - gold)
    if listed + unlisted > LOWEST_PROBABILITY:
        scale = (1.0 - gold) / (listed + unlisted)
        unlisted *= scale
    else:  # the row contradicts its realised token: the missing mass belongs to no id
        scale, unlisted = 0.0, 1.0 - gold
    for n in range(num + 1, num + 1 + ids_RK.shape[1]):
        masses_L[n] *= scale
    return num + 1 + ids_RK.shape[1], unlisted, max(0, size - num_inside)


@compiled
def starts_with_text(bytes_B: UInt8, offsets_V1: Int64, token: int, text_N: UInt8, begin: int, end: int) -> bool:
    """Return whether the token's bytes start with text[begin:end]."""
    if not 0 <= token < offsets_V1.shape[0] - 1:
        return False
    first = offsets_V1[token]
    same, n = offsets_V1[token + 1] - first >= end - begin, 0
    while same and n < end - begin:
        same = bytes_B[first + n] == text_N[begin + n]
        n += 1
    return bool(same)


@compiled
def open_row(
    source: Record,
    ids_RK: Int32,
    probs_RK: Float32,
    r: int,
    size: int,
    ids_L: Int32,
    masses_L: Float64,
    state: Record,
) -> None:
    """Add the row of a source token that starts at the target boundary at hand."""
    first = state.num
    state.realised = first
    state.num, unlisted, num_unlisted = add_row(
        ids_RK, probs_RK, r, source.tail, source.gold, source.id, size, first, ids_L, masses_L
    )
    if state.path != 1.0:
        unlisted *= state.path
        for h in range(first, state.num):
            masses_L[h] *= state.path
    state.unlisted, state.num_unlisted = unlisted, num_unlisted
    state.unlisted_each = unlisted / num_unlisted if num_unlisted > 0 else 0.0


@compiled
def count_unlisted(rows: SourceRows, row: int, tables: SourceTables, realised: int, length: int) -> float:
    """Return the number of unlisted ids that start with the realised token's first `length` bytes."""
    at = tables.offsets_V1[realised] + length - 1
    low, high = tables.prefix_low_B[at], tables.prefix_high_B[at]
    number, r, ids_RK, rank_V = high - low - 1, row - rows.first_row, rows.ids_RK, tables.rank_V
    for j in range(ids_RK.shape[1]):
        x = ids_RK[r, j]
        if 0 <= x < rank_V.shape[0] and x != realised and low <= rank_V[x] < high:
            number -= 1
    return float(max(0, number))


@compiled
def add_row_reaching(
    rows: SourceRows,
    tables: SourceTables,
    text: TextInBoth,
    row: int,
    end: int,
    hypotheses: Hypotheses,
) -> float:
    """Add the listed ids of a row that begins before `end` whose bytes are those of the text at least up to `end`.

    The realised id is added first, unless it ends at `end`. Returns the mass of all ids that were added.
    """
    ids_L, starts_L, masses_L, state = hypotheses.ids_L, hypotheses.starts_L, hypotheses.masses_L, hypotheses.state_1[0]
    source, room, first = text.sources_S[row], room_for(ids_L, rows.ids_RK), state.num
    last, unlisted, num_unlisted = add_row(
        rows.ids_RK,
        rows.probs_RK,
        row - rows.first_row,
        source.tail,
        source.gold,
        source.id,
        tables.rank_V.shape[0],
        first,
        ids_L,
        masses_L,
    )
    num, found, path = first, 0.0, state.path
    for n in range(first, last):
        x, mass = ids_L[n], path * masses_L[n]
        if not starts_with_text(tables.bytes_B, tables.offsets_V1, x, text.text_N, source.start, end):
            continue
        if n == first and source.end == end:
            found += mass
        elif n == first or num < room - 1:
            ids_L[num], starts_L[num], masses_L[num] = x, source.start, mass
            found += mass
            num += 1
    state.realised, state.num = first, num
    state.unlisted_each = path * unlisted / num_unlisted if num_unlisted > 0 else 0.0
    return found
