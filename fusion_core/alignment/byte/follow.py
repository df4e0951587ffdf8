"""The loop of the byte projection: source tokens followed through the target's tokens.

At a target boundary c several source tokens can be in progress: those of earlier rows that reach beyond c and whose
own target tokenisation agrees with every target token since they began. Next to them stands the row that the realised
source tokens have opened at c, if one of their boundaries is there. Each such hypothesis has the mass that the
source gave it, and predicts the next token of its target tokenisation. The realised target token keeps the hypotheses
that agree with it; the share of the mass that is kept is its probability, so the product over a text is the source's
own.

The last row alone would not do: a source that has "running" as one token gives "ning" next to no probability after its
token "run", so a target that splits the word would learn that "run" is never continued. And the share of the word's
mass in the row for "run" would depend on whether "ning" follows in the text, which that row must not know.

Shape legend: as in `columns`; L room for hypotheses, P pending look-ups.
"""

from __future__ import annotations

import math

import numpy as np

from fusion_core.alignment.byte.columns import MappedRows, Record, SourceRows, SourceTables, TextInBoth
from fusion_core.alignment.byte.hypotheses import (
    Hypotheses,
    drop_negligible,
    find_next_tokens,
    keep_agreeing,
    pass_token,
    relate_to_last_row,
    room_for,
)
from fusion_core.alignment.byte.source_row import add_row_reaching, count_unlisted, open_row
from fusion_core.alignment.byte.target_row import set_realised, write_row
from fusion_core.arrays import Int64
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots


@compiled
def map_target_tokens(
    rows: SourceRows,
    tables: SourceTables,
    text: TextInBoth,
    hypotheses: Hypotheses,
    follows: bool,
    out: MappedRows,
    pending_P: Int64,
) -> int:
    """Map the T target tokens at hand, whose source rows are all in `rows`.

    `hypotheses` is the state before the first of them and is left as the state after the last. Without `follows` every
    target token starts from the last row alone, and the realised token keeps the mass that is mapped onto it.
    Keys of the first-token table that are not known yet are collected in pending_P; the return value is their number,
    which can exceed P. Results are meaningful only when it is 0.
    """
    ids_RK, probs_RK, first_row = rows
    sources_S, targets_T = text.sources_S, text.targets_T
    ids_L, starts_L, masses_L, nexts_L, state_1 = hypotheses
    ids_TM, probs_TM, tail_T, log_mass_T, covered_T = out
    keys = np.full(num_slots(ids_TM.shape[1]), -1, dtype=np.int64)
    places, sums = np.empty(len(keys), dtype=np.int32), np.empty(ids_TM.shape[1], dtype=np.float64)
    size, room, num_pending, state = tables.rank_V.shape[0], room_for(ids_L, ids_RK), 0, state_1[0]
    text_end = sources_S[-1].end if len(sources_S) else 0
    for t in range(targets_T.shape[0] if len(sources_S) else 0):
        target = targets_T[t]
        source, last = sources_S[target.row], sources_S[target.last_row]
        opens = source.start == target.start
        begin_token(state, opens)
        if opens:
            if source.readable:
                open_row(source, ids_RK, probs_RK, target.row - first_row, size, ids_L, masses_L, state)
        elif not state.in_progress:
            if not source.readable or target.start == source.end:  # no source token starts at the end of the text
                continue
            start_within(rows, tables, text, target, hypotheses)
        state.in_progress = False
        if not target.wanted:
            log_mass_T[t] = math.log(masses_L[: state.num].sum() + state.unlisted) - state.log_path
            continue
        num_pending = find_next_tokens(
            tables.offsets_V1, tables.first_token, target, ids_L, starts_L, nexts_L, state, pending_P, num_pending
        )
        num_entries, tail, mass = write_row(
            t, nexts_L, masses_L, state.num, state.unlisted, keys, places, sums, ids_TM, probs_TM
        )
        log_mass_T[t], tail_T[t], covered_T[t] = math.log(mass) - state.log_path, tail, 1.0 - tail
        if not follows:
            continue
        state.mass = mass
        keep_agreeing(target, source, room, ids_L, starts_L, masses_L, nexts_L, state)
        if target.last_row > target.row:
            open_rows_within(rows, tables, text, target, hypotheses)
        ends = target.end == last.end
        if ends:
            state.num_unlisted = 0.0
        elif state.unlisted_each > 0.0:
            keep_unlisted(rows, tables, source, last, target, state)
        if target.end == text_end:  # only the realised source tokens end the text: the sum over it is their own
            state.kept = state.path * last.gold
        state.in_progress = True
        kept, moved = state.kept / state.mass, state.moved / state.mass
        tail_T[t] = set_realised(
            t, target.id, kept, state.mapped_to, moved, num_entries, tail, keys, places, ids_TM, probs_TM
        )
        drop_negligible(ids_L, starts_L, masses_L, state)
        if ends:
            pass_token(last, masses_L, state)
        relate_to_last_row(ends, last, masses_L, state)
    return num_pending


@compiled
def begin_token(state: Record, opens: bool) -> None:
    """Count the ids in progress at a target boundary; those of a row that `opens` are unlisted until it is added."""
    if not state.in_progress:
        state.num, state.path, state.log_path, state.outweighed = 0, 1.0, 0.0, False
    state.num_earlier = state.num
    state.unlisted = state.path if opens else state.num_unlisted * state.unlisted_each


@compiled
def start_within(
    rows: SourceRows, tables: SourceTables, text: TextInBoth, target: Record, hypotheses: Hypotheses
) -> None:
    """Start again at a target boundary within a source token, from that token's row alone."""
    state, source = hypotheses.state_1[0], text.sources_S[target.row]
    add_row_reaching(rows, tables, text, target.row, target.start, hypotheses)
    state.num_earlier = state.num
    state.num_unlisted = count_unlisted(rows, target.row, tables, source.id, target.start - source.start)
    state.unlisted = state.num_unlisted * state.unlisted_each


@compiled
def open_rows_within(
    rows: SourceRows,
    tables: SourceTables,
    text: TextInBoth,
    target: Record,
    hypotheses: Hypotheses,
) -> None:
    """Open the source rows that start within a target token, and add the ids that reach beyond its end."""
    state = hypotheses.state_1[0]
    for row in range(target.row + 1, target.last_row + 1):
        pass_token(text.sources_S[row - 1], hypotheses.masses_L, state)
        found = add_row_reaching(rows, tables, text, row, target.end, hypotheses)
        state.kept += found
        state.moved += found


@compiled
def keep_unlisted(
    rows: SourceRows, tables: SourceTables, source: Record, last: Record, target: Record, state: Record
) -> None:
    """Count the unlisted ids of the last row that agree with the text up to the end of the target token."""
    number = count_unlisted(rows, target.last_row, tables, last.id, target.end - last.start)
    if target.last_row > target.row:
        state.moved += number * state.unlisted_each
    else:
        number = min(number, state.num_unlisted)
        if source.start == target.start and not target.at_start:
            # Then it is known exactly how many ids go on with the target token.
            number = min(number, max(0.0, float(tables.num_first_U[target.id] - state.num_opened)))
    state.num_unlisted = number
    state.kept += number * state.unlisted_each
