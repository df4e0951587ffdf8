"""The loop of the byte projection: source tokens followed through the target's tokens.

At a target boundary c several source tokens can be in progress: those of earlier rows that reach beyond c and whose
own target tokenisation agrees with every target token since they began. Next to them stands the row that the realised
source tokens have opened at c, if one of their boundaries is there. Each such hypothesis weighs what the source gave
it, and says the next token of its target tokenisation. The realised target token keeps the hypotheses that agree with
it; the share that is kept is that token's probability, so the product over a text is the source's own.

Why not the last row alone: a source that knows "running" whole says next to nothing of "ning" after its token "run", so
a target that splits the word would learn that "run" is never continued. And how much of the word's mass its row for
"run" got would depend on whether the text goes on with "ning", which that row must not know.

Masses are relative to the probability of the realised source tokens before the last row. Letters as in `hypotheses`.
"""

from __future__ import annotations

import math

import numpy as np

from fusion_core.alignment.byte.hypotheses import (
    LOWEST_PROBABILITY,
    Boundaries,
    Hypotheses,
    MappedRows,
    SourceRows,
    SourceTables,
    add_reaching,
    keep_agreeing,
    known_ids,
    look_up,
    num_unknown,
)
from fusion_core.arrays import Float32, Float64, Int32, Int64
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, place_of

NEGLIGIBLE = 1e-10
"""Hypotheses below this share of the mass are not followed."""
_HIGHEST_MASS = 1e250


@compiled
def write_row(
    t: int,
    firsts_L: Int32,
    masses_L: Float64,
    num: int,
    unseen: float,
    keys: Int64,
    places: Int32,
    sums: Float64,
    ids_TM: Int32,
    probs_TM: Float32,
) -> tuple[int, float, float]:
    """Adds the hypotheses up by their next target token; `unseen` is the mass of unknown ids.

    Returns the number of entries, the tail, and the mass of all hypotheses. A full row leaves one place free.
    """
    width, num_entries, rest, mass = ids_TM.shape[1] - 1, 0, unseen, unseen
    for h in range(num):
        mass += masses_L[h]
        place = width
        if firsts_L[h] >= 0 and num_entries < width:
            place = place_of(keys, places, t, firsts_L[h], num_entries)
        if place == width:
            rest += masses_L[h]
        elif place == num_entries:
            ids_TM[t, place], sums[place] = firsts_L[h], masses_L[h]
            num_entries += 1
        else:
            sums[place] += masses_L[h]
    share = 1.0 / mass
    for m in range(num_entries):
        probs_TM[t, m] = sums[m] * share
    return num_entries, rest * share, mass


@compiled
def settle(
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
    """Gives the realised target token its exact probability; returns the new tail.

    What it needs beyond what was mapped onto it comes from the entry `moved_from`, onto which the realised source token
    was mapped, up to the mass `moved`, and then from the tail. What it has too much goes to the tail.
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


@compiled
def follow(  # noqa: PLR0912, PLR0915 - passing the loop's state around would cost more than its work
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
    ids_RK, probs_RK, tail_R, gold_R, first_row = rows
    ids_L, starts_L, masses_L, firsts_L, state = hypotheses
    ids_TM, probs_TM, tail_T, log_mass_T, covered_T = out
    starts_S1, source_ids_S, readable_S = window.source_starts_S1, window.source_ids_S, window.readable_S
    starts_T, ends_T, row_T, last_row_T = window.starts_T, window.ends_T, window.row_T, window.last_row_T
    target_ids_T, at_start_T, wanted_T = window.target_ids_T, window.at_start_T, window.wanted_T
    size, width, room = tables.rank_V.shape[0], ids_TM.shape[1] - 1, ids_L.shape[0] - ids_RK.shape[1] - 1
    keys = np.full(num_slots(width + 1), -1, dtype=np.int64)
    places = np.empty(len(keys), dtype=np.int32)
    sums = np.empty(width + 1, dtype=np.float64)
    num_pending = 0
    num, realised, unknown, unknown_mass, in_progress = int(state[0]), int(state[1]), state[2], state[3], state[4] > 0.0

    for t in range(starts_T.shape[0]):
        row, begin, end, target_id = row_T[t], starts_T[t], ends_T[t], target_ids_T[t]
        row_start, next_start = starts_S1[row], starts_S1[row + 1]
        opens = row_start == begin
        # What is in progress at `begin`.
        num = num_older = num if in_progress else 0
        unseen = unknown * unknown_mass
        if opens:
            unseen = 1.0
            if readable_S[row]:
                r, realised = row - first_row, num
                num, unseen, num_others = known_ids(
                    ids_RK, probs_RK, r, tail_R[r], gold_R[r], source_ids_S[row], size, num, ids_L, masses_L
                )
                unknown, unknown_mass = float(num_others), unseen / num_others if num_others > 0 else 0.0
        elif not in_progress:
            if not readable_S[row] or begin == next_start:  # at the end of the text stands no token
                continue
            realised = 0
            num, _, unknown_mass = add_reaching(rows, tables, window, row, begin, 1.0, 0.0, 0, room, hypotheses)
            num_older, unknown = num, num_unknown(rows, row, tables, source_ids_S[row], begin - row_start)
            unseen = unknown * unknown_mass
        in_progress = False
        if not wanted_T[t]:
            log_mass_T[t] = math.log(masses_L[:num].sum() + unseen)
            continue

        num_pending = look_up(
            tables.offsets_V1,
            tables.first_token,
            begin,
            at_start_T[t],
            num_older,
            num,
            ids_L,
            starts_L,
            firsts_L,
            pending_P,
            num_pending,
        )
        num_entries, tail, mass = write_row(t, firsts_L, masses_L, num, unseen, keys, places, sums, ids_TM, probs_TM)
        log_mass_T[t], tail_T[t], covered_T[t] = math.log(mass), tail, 1.0 - tail
        if not follows:
            continue

        # What goes on after the realised target token; `moved` is realised mass that was mapped onto another one.
        realised_first, realised_mass = firsts_L[realised], masses_L[realised]
        realised_id, threshold, last = ids_L[realised], NEGLIGIBLE * mass, last_row_T[t]
        num, kept, num_opened = keep_agreeing(
            target_id, realised, row_start, num_older, num, threshold, room, ids_L, starts_L, masses_L, firsts_L
        )
        moved, path = 0.0, 1.0
        if last == row:
            kept += realised_mass
            moved = realised_mass if realised_first != target_id else 0.0
            if end < next_start:
                realised = num
                ids_L[num], starts_L[num], masses_L[num] = realised_id, row_start, realised_mass
                num += 1
        for now in range(row + 1, last + 1):
            path *= max(gold_R[now - 1 - first_row], LOWEST_PROBABILITY)
            realised = num
            num, found, unknown_mass = add_reaching(
                rows, tables, window, now, end, path, threshold, num, room, hypotheses
            )
            kept, moved = kept + found, moved + found
        last_start, last_end = starts_S1[last], starts_S1[last + 1]
        if end == last_end:
            unknown, path = 0.0, path * max(gold_R[last - first_row], LOWEST_PROBABILITY)
        elif unknown_mass > 0.0:
            count = num_unknown(rows, last, tables, source_ids_S[last], end - last_start)
            if last > row:
                moved += count * unknown_mass
            else:
                count = min(count, unknown)
                if opens and not at_start_T[t]:  # then it is known exactly how many ids go on with the target token
                    count = min(count, max(0.0, float(tables.num_first_U[target_id] - num_opened)))
            unknown = count
            kept += unknown * unknown_mass
        if end == starts_S1[starts_S1.shape[0] - 1]:
            kept = path  # only the realised source tokens end the text: then the sum is the source's own
        for h in range(num):
            masses_L[h] = min(masses_L[h] / path, _HIGHEST_MASS)
        unknown_mass /= path
        in_progress = True

        tail_T[t] = settle(
            t,
            target_id,
            kept / mass,
            realised_first,
            moved / mass,
            num_entries,
            tail,
            keys,
            places,
            ids_TM,
            probs_TM,
        )
    state[0], state[1], state[2], state[3], state[4] = num, realised, unknown, unknown_mass, in_progress
    return num_pending
