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
    """Source tokens in progress at the current boundary; `state` holds their number, the number of unknown ids that
    could be in progress too (of the last row), and whether they belong to the boundary at all."""

    ids_L: Int32
    starts_L: Int64
    masses_L: Float64
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
    rows: SourceRows, row: int, realised: int, size: int, ids: Int32, masses: Float64
) -> tuple[int, float, int]:
    """Writes the ids whose probability is known, the realised one first with its exact probability.

    Returns their number, the mass of all other ids, and the number of these. All masses together are one.
    """
    ids_K, probs_K, gold = rows.ids_RK[row], rows.probs_RK[row], max(rows.gold_R[row], _LOWEST_PROBABILITY)
    ids[0], masses[0] = realised, gold
    num_ids, num_inside, known, is_candidate = 1, 1, 0.0, False
    for j in range(ids_K.shape[0]):
        if ids_K[j] == realised:
            is_candidate = True
        elif ids_K[j] >= 0:
            ids[num_ids], masses[num_ids] = ids_K[j], probs_K[j]
            known += probs_K[j]
            num_inside += ids_K[j] < size
            num_ids += 1
    unseen = rows.tail_R[row] if is_candidate else max(0.0, rows.tail_R[row] - gold)
    scale = (1.0 - gold) / (known + unseen) if known + unseen > 0.0 else 0.0
    for j in range(1, num_ids):
        masses[j] *= scale
    return num_ids, unseen * scale, max(0, size - num_inside)


@compiled
def starts_with_text(tables: SourceTables, token: int, text_N: UInt8, begin: int, end: int) -> bool:
    """Whether the token's bytes start with text[begin:end]."""
    first = tables.offsets_V1[token]
    if tables.offsets_V1[token + 1] - first < end - begin:
        return False
    for n in range(end - begin):
        if tables.blob_B[first + n] != text_N[begin + n]:
            return False
    return True


@compiled
def num_unknown_with_prefix(tables: SourceTables, realised: int, length: int, ids: Int32, num_ids: int) -> float:
    """How many ids that are not among `ids` start with the realised token's first `length` bytes."""
    at = tables.offsets_V1[realised] + length - 1
    low, high = tables.prefix_low_B[at], tables.prefix_high_B[at]
    number = high - low
    for n in range(num_ids):
        if ids[n] < tables.rank_V.shape[0] and low <= tables.rank_V[ids[n]] < high:
            number -= 1
    return float(max(0, number))


@compiled
def follow(
    rows: SourceRows,
    first_row: int,
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
    size, k = tables.rank_V.shape[0], rows.ids_RK.shape[1]
    width, room = out.ids_TM.shape[1] - 1, hypotheses.ids_L.shape[0]
    keys = np.full(num_slots(room + k + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    sums = np.empty(width + 1, dtype=np.float64)
    known, known_masses = np.empty(k + 1, dtype=np.int32), np.empty(k + 1, dtype=np.float64)
    # Hypotheses at the start of the current token: those in progress, then those of the row that opens there.
    ids, starts = np.empty(room + k + 1, dtype=np.int32), np.empty(room + k + 1, dtype=np.int64)
    masses, firsts = np.empty(room + k + 1, dtype=np.float64), np.empty(room + k + 1, dtype=np.int32)
    num_pending = 0

    for t in range(window.starts_T.shape[0]):
        row, begin, end = window.row_T[t], window.starts_T[t], window.ends_T[t]
        row_start, realised = window.source_starts_S1[row], window.source_ids_S[row]
        opens, readable = row_start == begin, window.readable_S[row]
        in_progress = hypotheses.state[2] > 0.0
        hypotheses.state[2] = 0.0
        if not readable and not opens:
            continue
        # The row of a token that cannot be read is all unknown.
        num_known, unseen_mass, num_others = 0, 1.0, 1
        if readable:
            num_known, unseen_mass, num_others = known_ids(rows, row - first_row, realised, size, known, known_masses)
        unseen_each = unseen_mass / num_others if num_others > 0 else 0.0

        num, num_unknown = 0, float(num_others)
        if in_progress:
            num, num_unknown = int(hypotheses.state[0]), hypotheses.state[1]
            ids[:num], starts[:num] = hypotheses.ids_L[:num], hypotheses.starts_L[:num]
            masses[:num] = hypotheses.masses_L[:num]
        elif not opens:
            num_unknown = num_unknown_with_prefix(tables, realised, begin - row_start, known, num_known)
        if opens:
            num_unknown = float(num_others)
        if opens or not in_progress:
            for n in range(num_known):
                x = known[n]
                if opens or (x < size and starts_with_text(tables, x, window.text_N, row_start, begin)):
                    ids[num], starts[num], masses[num] = x, row_start, known_masses[n]
                    num += 1
        unseen = unseen_mass if opens else unseen_each * num_unknown
        mass = masses[:num].sum() + unseen
        out.log_mass_T[t] = math.log(mass)
        if not window.wanted_T[t]:
            continue

        num_entries, rest, realised_place = 0, unseen, -1
        for h in range(num):
            x, behind, first = ids[h], begin - starts[h], -1
            if x < size:
                key = np.int64(-1)
                if behind > 0:
                    if tables.offsets_V1[x + 1] - tables.offsets_V1[x] > behind:
                        key = 2 * size + tables.offsets_V1[x] + behind
                else:
                    key = np.int64(size + x if window.at_start_T[t] else x)
                if key >= 0:
                    first = tables.first_token[key]
                    if first == UNKNOWN:
                        if num_pending < pending_P.shape[0]:
                            pending_P[num_pending] = key
                        num_pending += 1
            firsts[h] = first
            place = -1
            if first >= 0:
                place = place_of(keys, places, t, first, num_entries)
                if place == num_entries and num_entries < width:
                    out.ids_TM[t, place] = first
                    sums[place] = 0.0
                    num_entries += 1
            if 0 <= place < num_entries:
                sums[place] += masses[h]
            else:
                rest += masses[h]
            if x == realised and starts[h] == row_start:
                realised_place = place if place < num_entries else -1
        for m in range(num_entries):
            out.probs_TM[t, m] = sums[m] / mass
        out.tail_T[t] = rest / mass
        out.covered_T[t] = 1.0 - rest / mass
        if not follows:
            continue

        # What agrees with the realised target token goes on; `moved` is realised mass that was mapped elsewhere.
        target_id, last_row = window.target_ids_T[t], window.last_row_T[t]
        threshold = NEGLIGIBLE * mass
        num_kept, kept_mass, moved = 0, 0.0, 0.0
        for h in range(num):
            x = ids[h]
            is_realised = x == realised and starts[h] == row_start
            ends_at = starts[h] + (tables.offsets_V1[x + 1] - tables.offsets_V1[x] if x < size else 0)
            if is_realised:
                if ends_at < end:
                    continue
                if firsts[h] != target_id:
                    moved += masses[h]
                if ends_at == end:
                    kept_mass += masses[h]
                    continue
            elif firsts[h] != target_id or masses[h] < threshold:
                continue
            if num_kept < room:
                hypotheses.ids_L[num_kept], hypotheses.starts_L[num_kept] = x, starts[h]
                hypotheses.masses_L[num_kept] = masses[h]
                kept_mass += masses[h]
                num_kept += 1
        path, now = 1.0, row
        now_known, now_each, now_others = num_known, unseen_each, num_others
        while now < last_row:
            path *= max(rows.gold_R[now - first_row], _LOWEST_PROBABILITY)
            now += 1
            now_start, now_id = window.source_starts_S1[now], window.source_ids_S[now]
            now_known, now_mass, now_others = known_ids(rows, now - first_row, now_id, size, known, known_masses)
            now_each = now_mass / now_others if now_others > 0 else 0.0
            for n in range(now_known):
                x = known[n]
                mass_here = path * known_masses[n]
                if x >= size or not starts_with_text(tables, x, window.text_N, now_start, end):
                    continue
                if n > 0 and mass_here < threshold:
                    continue
                if n == 0 and window.source_starts_S1[now + 1] == end:
                    kept_mass += mass_here
                    moved += mass_here
                elif num_kept < room:
                    hypotheses.ids_L[num_kept], hypotheses.starts_L[num_kept] = x, now_start
                    hypotheses.masses_L[num_kept] = mass_here
                    kept_mass += mass_here
                    moved += mass_here
                    num_kept += 1
        num_unknown_after = 0.0
        if end < window.source_starts_S1[last_row + 1]:
            length = end - window.source_starts_S1[last_row]
            realised_last = window.source_ids_S[last_row]
            num_unknown_after = num_unknown_with_prefix(tables, realised_last, length, known, now_known)
            if last_row == row:
                num_unknown_after = min(num_unknown, num_unknown_after)
                if opens and not window.at_start_T[t]:
                    agreeing = tables.num_first_U[target_id]
                    for h in range(num):
                        agreeing -= starts[h] == row_start and firsts[h] == target_id
                    num_unknown_after = min(num_unknown_after, max(0.0, float(agreeing)))
            unseen_after = path * now_each * num_unknown_after
            kept_mass += unseen_after
            if last_row > row:
                moved += unseen_after
        if end == window.source_starts_S1[window.source_starts_S1.shape[0] - 1]:
            # At the end of the text only the realised source tokens count: their sum is the source's own.
            kept_mass = path * max(rows.gold_R[last_row - first_row], _LOWEST_PROBABILITY)
        else:
            hypotheses.state[0], hypotheses.state[1], hypotheses.state[2] = num_kept, num_unknown_after, 1.0
            if end == window.source_starts_S1[last_row + 1]:
                path *= max(rows.gold_R[last_row - first_row], _LOWEST_PROBABILITY)
            for n in range(num_kept):
                hypotheses.masses_L[n] = min(hypotheses.masses_L[n] / path, 1e250)
        settle(out, t, num_entries, target_id, realised_place, kept_mass / mass, moved / mass)
    return num_pending


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
    if needed > 0.0:  # rounding, or a source whose rows do not sum to one
        total = 0.0
        for m in range(num_entries):
            total += probs_M[m]
        scale = (total - realised - needed) / max(total - realised, 1e-30)
        for m in range(num_entries):
            if m != place:
                probs_M[m] *= max(0.0, scale)
