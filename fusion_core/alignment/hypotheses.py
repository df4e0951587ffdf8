"""Source tokens in progress, followed through the target's tokens: the compiled loop of the byte projection.

At a target boundary c several source tokens can be in progress: those of earlier rows that reach beyond c and whose
own target tokenisation agrees with every target token since they began. Next to them stands the row that the realised
source tokens have opened at c, if one of their boundaries is there. Each such hypothesis weighs what the source gave
it; the target's next token is the next token of its target tokenisation. Its realised target token keeps the
hypotheses that agree with it; the share that is kept is that token's probability.

Why not the last row alone: a source that knows "running" whole would say next to nothing of "ning" after the realised
source token "run", and the target would learn that "run" is never continued. And what a row says would depend on the
realised source token's end, which lies in the future of that row.

Masses are relative to the probability of the realised source tokens before the row in progress.

Shape legend: R rows of the source that the caller holds, S source tokens, K candidates of a row, T target tokens of
the part at hand, M entries of a target row, V source ids, U target ids, B bytes of all source ids together, N bytes of
the text, L room for hypotheses, P pending look-ups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_core.alignment.first_token_table import UNKNOWN
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, place_of

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

NEGLIGIBLE = 1e-10
"""Hypotheses below this share of the mass are not followed."""
_LOWEST_PROBABILITY = 1e-200
_HIGHEST_MASS = 1e250

# Places in `Hypotheses.state`.
NUMBER, NUM_UNKNOWN, MASS_OF_UNKNOWN, IN_PROGRESS = range(4)


class SourceTables(NamedTuple):
    """What is known of the source's ids, and where each one's target tokenisation goes on (`FirstTokenTable`)."""

    blob_B: UInt8
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


class Hypotheses(NamedTuple):
    """Source tokens in progress at a target boundary: id, start, mass, and the target token that comes next.

    `state` holds their number; how many ids of the last row, probability unknown, could be in progress too, and the
    mass of each; and whether all this belongs to the boundary at hand.
    """

    ids_L: Int32
    starts_L: Int64
    masses_L: Float64
    firsts_L: Int32
    state: Float64


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
    rows: SourceRows, row: int, realised: int, size: int, ids_L: Int32, masses_L: Float64
) -> tuple[int, float, int]:
    """Writes the ids whose probability is known, the realised one first with its exact probability.

    Returns their number, the mass of all other ids, and the number of these. All masses together are one.
    """
    r = row - rows.first_row
    gold, k = max(rows.gold_R[r], _LOWEST_PROBABILITY), rows.ids_RK.shape[1]
    ids_L[0], masses_L[0] = realised, gold
    num, num_inside, known, is_candidate = 1, 1, 0.0, False
    for j in range(k):
        x = rows.ids_RK[r, j]
        if x == realised:
            is_candidate = True
        elif x >= 0:
            ids_L[num], masses_L[num] = x, rows.probs_RK[r, j]
            known += masses_L[num]
            num_inside += x < size
            num += 1
    unseen = rows.tail_R[r] if is_candidate else max(0.0, rows.tail_R[r] - gold)
    scale = (1.0 - gold) / (known + unseen) if known + unseen > 0.0 else 0.0
    for n in range(1, num):
        masses_L[n] *= scale
    return num, unseen * scale, max(0, size - num_inside)


@compiled
def starts_with_text(blob_B: UInt8, offsets_V1: Int64, token: int, text_N: UInt8, begin: int, end: int) -> bool:
    """Whether the token's bytes start with text[begin:end]."""
    if token >= offsets_V1.shape[0] - 1:
        return False
    first = offsets_V1[token]
    same, n = offsets_V1[token + 1] - first >= end - begin, 0
    while same and n < end - begin:
        same = blob_B[first + n] == text_N[begin + n]
        n += 1
    return bool(same)


@compiled
def num_unknown(rows: SourceRows, row: int, tables: SourceTables, realised: int, length: int) -> float:
    """How many ids whose probability is unknown start with the realised token's first `length` bytes."""
    at = tables.offsets_V1[realised] + length - 1
    low, high = tables.prefix_low_B[at], tables.prefix_high_B[at]
    number = high - low - 1
    for j in range(rows.ids_RK.shape[1]):
        x = rows.ids_RK[row - rows.first_row, j]
        if 0 <= x < tables.rank_V.shape[0] and x != realised and low <= tables.rank_V[x] < high:
            number -= 1
    return float(max(0, number))


@compiled
def begin_at(rows: SourceRows, tables: SourceTables, window: Boundaries, t: int, hypotheses: Hypotheses) -> float:
    """Completes the hypotheses at the start of target token t; returns the mass of ids whose probability is unknown.

    A row that opens there is added. Without hypotheses in progress, those of the last row that start with the bytes
    behind take their place. Negative when the last row's token cannot be read.
    """
    state, row, begin = hypotheses.state, window.row_T[t], window.starts_T[t]
    start, realised = window.source_starts_S1[row], window.source_ids_S[row]
    num = int(state[NUMBER]) if state[IN_PROGRESS] > 0.0 else 0
    if state[IN_PROGRESS] > 0.0 and start < begin:
        return float(state[NUM_UNKNOWN] * state[MASS_OF_UNKNOWN])
    if not window.readable_S[row]:
        state[NUMBER] = num
        return 1.0 if start == begin else -1.0  # a row that cannot be used is all unknown
    num_known, unseen, num_others = known_ids(
        rows, row, realised, tables.rank_V.shape[0], hypotheses.ids_L[num:], hypotheses.masses_L[num:]
    )
    state[NUM_UNKNOWN], state[MASS_OF_UNKNOWN] = num_others, unseen / num_others if num_others > 0 else 0.0
    if start == begin:
        hypotheses.starts_L[num : num + num_known] = start
        state[NUMBER] = num + num_known
        return float(unseen)
    for n in range(num_known):
        if starts_with_text(tables.blob_B, tables.offsets_V1, hypotheses.ids_L[n], window.text_N, start, begin):
            hypotheses.ids_L[num], hypotheses.masses_L[num] = hypotheses.ids_L[n], hypotheses.masses_L[n]
            hypotheses.starts_L[num] = start
            num += 1
    state[NUMBER] = num
    state[NUM_UNKNOWN] = num_unknown(rows, row, tables, realised, begin - start)
    return float(state[NUM_UNKNOWN] * state[MASS_OF_UNKNOWN])


@compiled
def key_of(offsets_V1: Int64, token: int, behind: int, at_start: bool) -> int:
    """Where the first-token table has what is left of the token after `behind` bytes; -1 when nothing is left."""
    size = offsets_V1.shape[0] - 1
    if token >= size:
        return -1
    if behind == 0:
        return size + token if at_start else token
    position = offsets_V1[token] + behind
    return int(2 * size + position) if position < offsets_V1[token + 1] else -1


@compiled
def advance(
    rows: SourceRows, tables: SourceTables, window: Boundaries, t: int, hypotheses: Hypotheses, threshold: float
) -> tuple[float, float]:
    """Keeps what agrees with the realised target token t, and adds what begins within it and reaches its end.

    Returns the mass that is kept, and how much of it had the realised source token mapped to another target token.
    """
    row, end, target_id = window.row_T[t], window.ends_T[t], window.target_ids_T[t]
    last, starts_S1, state = window.last_row_T[t], window.source_starts_S1, hypotheses.state
    size, room = tables.rank_V.shape[0], hypotheses.ids_L.shape[0] - rows.ids_RK.shape[1] - 1
    num, num_agreeing = 0, 0
    kept, moved = 0.0, 0.0
    for h in range(int(state[NUMBER])):
        x, start = hypotheses.ids_L[h], hypotheses.starts_L[h]
        agrees = hypotheses.firsts_L[h] == target_id
        num_agreeing += agrees and start == starts_S1[row]
        mass = hypotheses.masses_L[h]
        if x == window.source_ids_S[row] and start == starts_S1[row]:
            if starts_S1[row + 1] < end:
                continue
            moved += 0.0 if agrees else mass
            if starts_S1[row + 1] == end:
                kept += mass
                continue
        elif not agrees or mass < threshold:
            continue
        if num < room:
            hypotheses.ids_L[num], hypotheses.starts_L[num], hypotheses.masses_L[num] = x, start, mass
            kept += mass
            num += 1

    path, unknown = 1.0, state[NUM_UNKNOWN]
    for now in range(row + 1, last + 1):
        path *= max(rows.gold_R[now - 1 - rows.first_row], _LOWEST_PROBABILITY)
        num_known, unseen, num_others = known_ids(
            rows, now, window.source_ids_S[now], size, hypotheses.ids_L[num:], hypotheses.masses_L[num:]
        )
        state[MASS_OF_UNKNOWN], unknown = path * unseen / num_others if num_others > 0 else 0.0, float(num_others)
        first = num
        for n in range(first, first + num_known):
            x, mass = hypotheses.ids_L[n], path * hypotheses.masses_L[n]
            if not starts_with_text(tables.blob_B, tables.offsets_V1, x, window.text_N, starts_S1[now], end) or (
                n > first and mass < threshold
            ):
                continue
            if n == first and starts_S1[now + 1] == end:
                kept, moved = kept + mass, moved + mass
            elif num < room:
                hypotheses.ids_L[num], hypotheses.starts_L[num], hypotheses.masses_L[num] = x, starts_S1[now], mass
                kept, moved = kept + mass, moved + mass
                num += 1
    state[NUMBER], state[NUM_UNKNOWN] = num, 0.0
    if end < starts_S1[last + 1] and state[MASS_OF_UNKNOWN] > 0.0:
        length = end - starts_S1[last]
        state[NUM_UNKNOWN] = min(unknown, num_unknown(rows, last, tables, window.source_ids_S[last], length))
        if last == row and starts_S1[row] == window.starts_T[t] and not window.at_start_T[t]:
            # For the row's first target token it is known exactly how many ids go on with it.
            state[NUM_UNKNOWN] = min(state[NUM_UNKNOWN], max(0.0, float(tables.num_first_U[target_id] - num_agreeing)))
        unseen = state[NUM_UNKNOWN] * state[MASS_OF_UNKNOWN]
        kept += unseen
        moved += unseen if last > row else 0.0
    if end == starts_S1[last + 1]:
        path *= max(rows.gold_R[last - rows.first_row], _LOWEST_PROBABILITY)
    if end == starts_S1[starts_S1.shape[0] - 1]:
        # At the end of the text only the realised source tokens count: then the sum is the source's own.
        kept = path
    for n in range(num):
        hypotheses.masses_L[n] = min(hypotheses.masses_L[n] / path, _HIGHEST_MASS)
    state[MASS_OF_UNKNOWN] /= path
    return kept, moved


@compiled
def settle(
    out: MappedRows, t: int, num_entries: int, target_id: int, realised_place: int, realised: float, moved: float
) -> None:
    """Gives the realised target token its exact probability.

    What it needs beyond what was mapped onto it comes from where the realised source token was mapped, as far as its
    mass moved on, and then from the tail; what it has too much goes to the tail.
    """
    probs_M = out.probs_TM[t]
    place = 0
    while place < num_entries and out.ids_TM[t, place] != target_id:
        place += 1
    if place == num_entries:
        out.ids_TM[t, place] = target_id
        num_entries += 1
    needed = realised - probs_M[place]
    if needed > 0.0 and 0 <= realised_place != place:
        taken = min(needed, moved, np.float64(probs_M[realised_place]))
        probs_M[realised_place] -= np.float32(taken)
        needed -= taken
    taken = min(needed, out.tail_T[t])
    out.tail_T[t] -= taken
    needed -= taken
    probs_M[place] = realised
    if needed > 0.0:  # rounding
        others = probs_M[:num_entries].sum() - realised
        for m in range(num_entries):
            if m != place:
                probs_M[m] *= max(0.0, 1.0 - needed / max(others, 1e-30))


@compiled
def follow(
    rows: SourceRows,
    tables: SourceTables,
    window: Boundaries,
    hypotheses: Hypotheses,
    follows: bool,
    out: MappedRows,
    pending_P: Int64,
) -> int:
    """Maps the T target tokens at hand, whose source rows are all in `rows`.

    `hypotheses` is the state before the first of them and is left as the state after the last. Without `follows` every
    target token starts anew from the last row alone, and the realised token keeps what is mapped onto it.

    Keys of the first-token table that are not known yet are collected in pending_P; the return value is their number,
    which can exceed P. Results are meaningful only when it is 0.
    """
    width = out.ids_TM.shape[1] - 1
    keys = np.full(num_slots(width + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    sums = np.empty(width + 1, dtype=np.float64)
    ids_L, starts_L, masses_L, firsts_L, _ = hypotheses
    offsets_V1, first_token = tables.offsets_V1, tables.first_token
    num_pending = 0
    for t in range(window.starts_T.shape[0]):
        unseen = begin_at(rows, tables, window, t, hypotheses)
        hypotheses.state[IN_PROGRESS] = 0.0
        if unseen < 0.0:
            continue
        num, row = int(hypotheses.state[NUMBER]), window.row_T[t]
        mass = hypotheses.masses_L[:num].sum() + unseen
        out.log_mass_T[t] = math.log(mass)
        if not window.wanted_T[t]:
            continue
        num_entries, rest, realised_place = 0, unseen, -1
        begin, at_start = window.starts_T[t], window.at_start_T[t]
        row_id, row_start = window.source_ids_S[row], window.source_starts_S1[row]
        for h in range(num):
            x, start = ids_L[h], starts_L[h]
            key = key_of(offsets_V1, x, begin - start, at_start)
            first = first_token[key] if key >= 0 else -1
            if first == UNKNOWN:
                if num_pending < pending_P.shape[0]:
                    pending_P[num_pending] = key
                num_pending += 1
            firsts_L[h] = first
            place = width
            if first >= 0 and num_entries < width:
                place = place_of(keys, places, t, first, num_entries)
                if place == num_entries:
                    out.ids_TM[t, place], sums[place] = first, 0.0
                    num_entries += 1
            if place == width:
                rest += masses_L[h]
                continue
            sums[place] += masses_L[h]
            if x == row_id and start == row_start:
                realised_place = place
        for m in range(num_entries):
            out.probs_TM[t, m] = sums[m] / mass
        out.tail_T[t] = rest / mass
        out.covered_T[t] = 1.0 - rest / mass
        if follows:
            kept, moved = advance(rows, tables, window, t, hypotheses, NEGLIGIBLE * mass)
            settle(out, t, num_entries, window.target_ids_T[t], realised_place, kept / mass, moved / mass)
            hypotheses.state[IN_PROGRESS] = 1.0
    return num_pending
