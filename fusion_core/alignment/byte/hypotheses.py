"""Source tokens in progress at a target boundary: the compiled pieces of `follow`.

Shape legend: R rows of the source that the caller holds, S source tokens, K candidates of a row, T target tokens of
the part at hand, M entries of a target row, V source ids, U target ids, B bytes of all source ids together, N bytes of
the text, L room for hypotheses, P pending look-ups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusion_core.alignment.byte.first_token_table import UNKNOWN
from fusion_core.arrays import Bool, Float32, Float64, Int32, Int64, UInt8
from fusion_core.compiled import compiled

LOWEST_PROBABILITY = 1e-200
"""Stands in for a realised source token of probability zero, so that what goes on beside it keeps a finite mass."""


class SourceTables(NamedTuple):
    """What is known of the source's ids, and where each one's target tokenisation goes on (`FirstTokenTable`)."""

    bytes_B: UInt8
    offsets_V1: Int64
    prefix_low_B: Int32
    prefix_high_B: Int32
    rank_V: Int32
    first_token: Int32
    num_first_U: Int32


class SourceRows(NamedTuple):
    """Consecutive source rows, as probabilities; the first one is row `first_row` of the window."""

    ids_RK: Int32
    probs_RK: Float32
    tail_R: Float64
    gold_R: Float64
    first_row: int


class Boundaries(NamedTuple):
    """The window in the source's byte positions. Source columns are of all S tokens, target columns of the T at hand.

    `row_T` is the last source token that starts at or before the target token, `last_row_T` the last one that starts
    before its end; `readable_S` whether a token's bytes are those of the text; `at_start_T` marks the target token that
    holds a dummy prefix which the source does not read; rows that are not `wanted_T` stay empty.
    """

    text_N: UInt8
    source_ids_S: Int32
    source_starts_S1: Int64
    readable_S: Bool
    target_ids_T: Int32
    starts_T: Int64
    ends_T: Int64
    row_T: Int64
    last_row_T: Int64
    at_start_T: Bool
    wanted_T: Bool

    def of_tokens(self, first: int, end: int) -> Boundaries:
        """The same window with target tokens first..end-1 at hand."""
        return self._replace(
            target_ids_T=self.target_ids_T[first:end],
            starts_T=self.starts_T[first:end],
            ends_T=self.ends_T[first:end],
            row_T=self.row_T[first:end],
            last_row_T=self.last_row_T[first:end],
            at_start_T=self.at_start_T[first:end],
            wanted_T=self.wanted_T[first:end],
        )


class Hypotheses(NamedTuple):
    """Source tokens in progress at a target boundary: id, start, mass, and the target token that comes next.

    `state` keeps between calls: their number; the place of the realised one; how many ids of the last row whose
    probability is unknown could be in progress too, and the mass of each; whether all this is of the boundary at hand.
    """

    ids_L: Int32
    starts_L: Int64
    masses_L: Float64
    firsts_L: Int32
    state: Float64

    @classmethod
    def none(cls, room: int) -> Hypotheses:
        return cls(
            np.empty(room, dtype=np.int32),
            np.empty(room, dtype=np.int64),
            np.empty(room, dtype=np.float64),
            np.empty(room, dtype=np.int32),
            np.zeros(5),
        )

    def copy(self) -> Hypotheses:
        return Hypotheses(
            self.ids_L.copy(), self.starts_L.copy(), self.masses_L.copy(), self.firsts_L.copy(), self.state.copy()
        )


class MappedRows(NamedTuple):
    """Rows of consecutive target tokens; every row has a free place behind its entries.

    `log_mass_T` is the log of the mass of all hypotheses where the token starts, `covered_T` what reached an entry
    before the realised token got its exact probability.
    """

    ids_TM: Int32
    probs_TM: Float32
    tail_T: Float64
    log_mass_T: Float64
    covered_T: Float32


@compiled
def known_ids(
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
    """Adds the ids whose probability is known behind the first `num`, the realised one first, exactly.

    Returns the new number, the mass of all other ids, and the number of these. The masses together are one. What is no
    candidate is written with mass zero as id -1.
    """
    gold = max(gold, LOWEST_PROBABILITY)
    ids_L[num], masses_L[num] = realised, gold
    num_inside, known, is_candidate = 1, 0.0, False
    for j in range(ids_RK.shape[1]):
        x = ids_RK[row, j]
        is_realised = x == realised
        is_candidate |= is_realised
        counts = x >= 0 and not is_realised
        ids_L[num + 1 + j] = x if counts else -1
        masses_L[num + 1 + j] = probs_RK[row, j] if counts else np.float32(0.0)
        known += masses_L[num + 1 + j]
        num_inside += counts and x < size
    unseen = tail if is_candidate else max(0.0, tail - gold)
    scale = (1.0 - gold) / (known + unseen) if known + unseen > 0.0 else 0.0
    for n in range(num + 1, num + 1 + ids_RK.shape[1]):
        masses_L[n] *= scale
    return num + 1 + ids_RK.shape[1], unseen * scale, max(0, size - num_inside)


@compiled
def starts_with_text(bytes_B: UInt8, offsets_V1: Int64, token: int, text_N: UInt8, begin: int, end: int) -> bool:
    """Whether the token's bytes start with text[begin:end]."""
    if not 0 <= token < offsets_V1.shape[0] - 1:
        return False
    first = offsets_V1[token]
    same, n = offsets_V1[token + 1] - first >= end - begin, 0
    while same and n < end - begin:
        same = bytes_B[first + n] == text_N[begin + n]
        n += 1
    return bool(same)


@compiled
def num_unknown(rows: SourceRows, row: int, tables: SourceTables, realised: int, length: int) -> float:
    """How many ids whose probability is unknown start with the realised token's first `length` bytes."""
    at = tables.offsets_V1[realised] + length - 1
    low, high = tables.prefix_low_B[at], tables.prefix_high_B[at]
    number, r, ids_RK, rank_V = high - low - 1, row - rows.first_row, rows.ids_RK, tables.rank_V
    for j in range(ids_RK.shape[1]):
        x = ids_RK[r, j]
        if 0 <= x < rank_V.shape[0] and x != realised and low <= rank_V[x] < high:
            number -= 1
    return float(max(0, number))


@compiled
def add_reaching(
    rows: SourceRows,
    tables: SourceTables,
    window: Boundaries,
    row: int,
    end: int,
    path: float,
    threshold: float,
    num: int,
    room: int,
    hypotheses: Hypotheses,
) -> tuple[int, float, float]:
    """Adds the known ids of a row that begins before `end` and whose bytes are those of the text at least up to it.

    `path` is the mass of the realised source tokens before the row. The realised id is added first, unless it ends at
    `end`. Returns the new number, the mass of what was found, and the mass of each unknown id.
    """
    ids_L, starts_L, masses_L = hypotheses.ids_L, hypotheses.starts_L, hypotheses.masses_L
    r, start, realised = row - rows.first_row, window.source_starts_S1[row], window.source_ids_S[row]
    last, unseen, num_others = known_ids(
        rows.ids_RK,
        rows.probs_RK,
        r,
        rows.tail_R[r],
        rows.gold_R[r],
        realised,
        tables.rank_V.shape[0],
        num,
        ids_L,
        masses_L,
    )
    first, found = num, 0.0
    for n in range(first, last):
        x, mass = ids_L[n], path * masses_L[n]
        if not starts_with_text(tables.bytes_B, tables.offsets_V1, x, window.text_N, start, end):
            continue
        if n == first and window.source_starts_S1[row + 1] == end:
            found += mass
        elif n == first or (num < room - 1 and mass >= threshold):
            ids_L[num], starts_L[num], masses_L[num] = x, start, mass
            found += mass
            num += 1
    return num, found, path * unseen / num_others if num_others > 0 else 0.0


@compiled
def look_up(
    offsets_V1: Int64,
    first_token: Int32,
    begin: int,
    at_start: bool,
    num_older: int,
    num: int,
    ids_L: Int32,
    starts_L: Int64,
    firsts_L: Int32,
    pending_P: Int64,
    num_pending: int,
) -> int:
    """Fills in which target token comes next in every hypothesis, -1 for none.

    Those from num_older on start at `begin`. Returns the number of look-ups that are pending.
    """
    size = offsets_V1.shape[0] - 1
    base = size if at_start else 0
    for h in range(num):
        x, key = ids_L[h], -1
        if h >= num_older:
            key = base + x if 0 <= x < size else -1
        elif offsets_V1[x] + begin - starts_L[h] < offsets_V1[x + 1]:
            key = 2 * size + offsets_V1[x] + begin - starts_L[h]
        firsts_L[h] = first_token[key] if key >= 0 else -1
        if firsts_L[h] == UNKNOWN:
            if num_pending < pending_P.shape[0]:
                pending_P[num_pending] = key
            num_pending += 1
    return num_pending


@compiled
def keep_agreeing(
    target_id: int,
    realised: int,
    row_start: int,
    num_older: int,
    num: int,
    threshold: float,
    room: int,
    ids_L: Int32,
    starts_L: Int64,
    masses_L: Float64,
    firsts_L: Int32,
) -> tuple[int, float, int]:
    """Keeps the hypotheses that go on with the target token, in place, all but the realised one.

    Returns their number, their mass, and how many of them belong to the row that opened (from num_older on).
    """
    kept, mass, num_opened = 0, 0.0, 0
    for h in range(num):
        if firsts_L[h] != target_id:
            continue
        num_opened += h >= num_older
        if h != realised and masses_L[h] >= threshold and kept < room - 1:
            ids_L[kept], masses_L[kept] = ids_L[h], masses_L[h]
            starts_L[kept] = starts_L[h] if h < num_older else row_start
            mass += masses_L[kept]
            kept += 1
    return kept, mass, num_opened
