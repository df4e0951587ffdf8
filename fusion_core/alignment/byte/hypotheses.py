"""Source tokens in progress at a target boundary, and the compiled pieces that look them up, drop and scale them.

A hypothesis is one token that the source may be in the middle of: its id, where it starts, and its mass.

Masses are relative to the probability of the realised source tokens before the last row that has opened, so the ids of
that row add up to one. Where the realised tokens are next to impossible beside other hypotheses, that unit is too small
for a float64: then masses are relative to the largest hypothesis (`change_unit`).

Shape legend: as in `columns`; L room for hypotheses, P pending look-ups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fusion_core.alignment.byte.columns import Record, Records
from fusion_core.alignment.byte.first_token_table import UNKNOWN
from fusion_core.arrays import Float64, Int32, Int64
from fusion_core.compiled import compiled

LOWEST_PROBABILITY = 1e-200
"""Probability of a realised source token that the source calls impossible: other hypotheses keep a finite mass."""
LOWEST_PATH = 1e-100
"""The least mass of the realised path relative to other hypotheses, and to the unit: its product with
`LOWEST_PROBABILITY` is still a normal float64."""
NEGLIGIBLE = 1e-10
"""Share of the mass below which a hypothesis is not followed."""

STATE = np.dtype(
    [
        ("num", np.int64),
        ("num_earlier", np.int64),
        ("realised", np.int64),
        ("in_progress", np.bool_),
        ("num_unlisted", np.float64),
        ("unlisted_each", np.float64),
        ("unlisted", np.float64),
        ("path", np.float64),
        ("log_path", np.float64),
        ("outweighed", np.bool_),
        ("mass", np.float64),
        ("kept", np.float64),
        ("moved", np.float64),
        ("mapped_to", np.int64),
        ("num_opened", np.int64),
    ],
    align=True,
)
"""The state that the hypotheses share.

num, num_earlier: their number, and the number of those that began before the target boundary at hand.
realised: the place of the realised source token among them.
in_progress: true when they belong to the target boundary at hand; else the next token starts from the last row alone.
num_unlisted, unlisted_each, unlisted: the number of unlisted ids of the last row that could be in progress too, the
    mass of each, and of all.
path, log_path: the mass of the realised source tokens before the last row, and its logarithm; 1 and 0 at a boundary.
outweighed: `path` is raised to `LOWEST_PATH` times the largest mass, and only `log_path` is exact.
mass, kept: the mass of all hypotheses, and the part of it that agrees with the target token at hand.
moved: the part of it that was mapped onto other target tokens.
mapped_to: the target token that the realised source token was mapped onto.
num_opened: the number of hypotheses of the row that opened that agree with the target token.
"""


class Hypotheses(NamedTuple):
    """The source tokens in progress at a target boundary, each one's next target token (-1: none), and STATE."""

    ids_L: Int32
    starts_L: Int64
    masses_L: Float64
    nexts_L: Int32
    state_1: Records

    @classmethod
    def none(cls, room: int) -> Hypotheses:
        return cls(
            np.empty(room, dtype=np.int32),
            np.empty(room, dtype=np.int64),
            np.empty(room, dtype=np.float64),
            np.empty(room, dtype=np.int32),
            np.zeros(1, dtype=STATE),
        )

    def copy(self) -> Hypotheses:
        ids_L, starts_L, masses_L, nexts_L, state_1 = self
        return Hypotheses(ids_L.copy(), starts_L.copy(), masses_L.copy(), nexts_L.copy(), state_1.copy())


@compiled
def room_for(ids_L: Int32, ids_RK: Int32) -> int:
    """Return the number of hypotheses beside which one more row can be written."""
    return int(ids_L.shape[0] - ids_RK.shape[1] - 1)


@compiled
def find_next_tokens(
    offsets_V1: Int64,
    first_token: Int32,
    target: Record,
    ids_L: Int32,
    starts_L: Int64,
    nexts_L: Int32,
    state: Record,
    pending_P: Int64,
    num_pending: int,
) -> int:
    """Fill in the next target token of every hypothesis where `target` starts, -1 for none.

    Returns the number of pending look-ups.
    """
    begin, num_earlier = target.start, state.num_earlier
    size = offsets_V1.shape[0] - 1
    base = size if target.at_start else 0
    for h in range(state.num):
        x, key = ids_L[h], -1
        if h >= num_earlier:
            key = base + x if 0 <= x < size else -1
        elif offsets_V1[x] + begin - starts_L[h] < offsets_V1[x + 1]:
            key = 2 * size + offsets_V1[x] + begin - starts_L[h]
        nexts_L[h] = first_token[key] if key >= 0 else -1
        if nexts_L[h] == UNKNOWN:
            if num_pending < pending_P.shape[0]:
                pending_P[num_pending] = key
            num_pending += 1
    return num_pending


@compiled
def keep_agreeing(
    target: Record,
    source: Record,
    room: int,
    ids_L: Int32,
    starts_L: Int64,
    masses_L: Float64,
    nexts_L: Int32,
    state: Record,
) -> None:
    """Keep, in place, the hypotheses whose next target token is `target`, and the realised one if it reaches further.

    `source` is the realised token.
    """
    num, kept, num_opened, target_id = 0, 0.0, 0, target.id
    realised, num_earlier, row_start = state.realised, state.num_earlier, source.start
    realised_mass, state.mapped_to = masses_L[realised], nexts_L[realised]
    for h in range(state.num):
        if nexts_L[h] != target_id:
            continue
        num_opened += h >= num_earlier
        if h != realised and num < room - 1:
            ids_L[num], masses_L[num] = ids_L[h], masses_L[h]
            starts_L[num] = starts_L[h] if h < num_earlier else row_start
            kept += masses_L[num]
            num += 1
    state.moved = 0.0
    if target.last_row == target.row:
        kept += realised_mass
        if state.mapped_to != target_id:
            state.moved = realised_mass
        if target.end < source.end:
            state.realised = num
            ids_L[num], starts_L[num], masses_L[num] = source.id, source.start, realised_mass
            num += 1
    state.num, state.kept, state.num_opened = num, kept, num_opened


@compiled
def drop_negligible(ids_L: Int32, starts_L: Int64, masses_L: Float64, state: Record) -> None:
    """Drop, in place, the hypotheses with next to none of the mass that is kept, but never the realised one."""
    num, realised, threshold = 0, state.realised, NEGLIGIBLE * state.kept
    for h in range(state.num):
        if masses_L[h] >= threshold or h == realised:
            if h == realised:
                state.realised = num
            ids_L[num], starts_L[num], masses_L[num] = ids_L[h], starts_L[h], masses_L[h]
            num += 1
    state.num = num


@compiled
def pass_token(source: Record, masses_L: Float64, state: Record) -> None:
    """Multiply the realised path by the probability of a source token."""
    state.path *= max(source.gold, LOWEST_PROBABILITY)
    state.log_path += source.log_gold
    if state.path < LOWEST_PATH:
        largest = _largest(masses_L, state, -1)
        state.outweighed = largest > 0.0 and math.log(largest) - state.log_path > -math.log(LOWEST_PATH)
        if state.outweighed:
            state.path = LOWEST_PATH * largest
        else:
            for h in range(state.num):
                masses_L[h] = _scaled(masses_L[h], -state.log_path)
            state.mass = _scaled(state.mass, -state.log_path)
            state.kept = _scaled(state.kept, -state.log_path)
            state.moved = _scaled(state.moved, -state.log_path)
            state.path, state.log_path = 1.0, 0.0


@compiled
def relate_to_last_row(ends: bool, last: Record, masses_L: Float64, state: Record) -> None:
    """Make masses relative to the realised source tokens before the row that is in progress, or opens next.

    `last` is the realised source token of the last row; `ends`: a row opens next, that token has ended.
    """
    largest, unlisted_each = 0.0, state.unlisted_each / state.path
    if not state.outweighed:
        for h in range(state.num):
            masses_L[h] /= state.path
            largest = max(largest, masses_L[h])
        state.path, state.log_path, state.unlisted_each = 1.0, 0.0, unlisted_each
    if state.outweighed or largest > 1.0 / LOWEST_PATH:
        change_unit(masses_L, state, -1 if ends else state.realised, max(last.gold, LOWEST_PROBABILITY), unlisted_each)


@compiled
def change_unit(masses_L: Float64, state: Record, realised: int, realised_mass: float, unlisted_each: float) -> None:
    """Make masses relative to the realised path, or to the largest of them while that outweighs the path.

    `realised` is the place of the realised hypothesis (-1 for none); its mass and `unlisted_each` are given relative to
    the path, because they are lost in the present unit.
    """
    nats, largest, log_unit = -state.log_path, _largest(masses_L, state, realised), 0.0
    state.outweighed = largest > 0.0 and math.log(largest) + nats > -math.log(LOWEST_PATH)
    if state.outweighed:
        log_unit = math.log(largest) + nats
    for h in range(state.num):
        masses_L[h] = _scaled(masses_L[h], nats - log_unit)
    state.path, state.log_path = (LOWEST_PATH if state.outweighed else 1.0), -log_unit
    state.unlisted_each = unlisted_each * state.path
    if realised >= 0:
        masses_L[realised] = realised_mass * state.path


@compiled
def _largest(masses_L: Float64, state: Record, realised: int) -> float:
    """Return the largest mass of a hypothesis other than the realised one."""
    largest = 0.0
    for h in range(state.num):
        if h != realised:
            largest = max(largest, masses_L[h])
    return largest


@compiled
def _scaled(mass: float, nats: float) -> float:
    """Return mass * exp(nats) where only the product is within the range of float64."""
    return math.exp(math.log(mass) + nats) if mass > 0.0 else 0.0
