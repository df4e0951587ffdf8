"""Entropic optimal transport between small distributions, one problem per position.

Minimises <G, C> - w H(G) over plans G with the given marginals: G = diag(u) exp(-C / w) diag(v), by alternately
scaling rows and columns (Cuturi 2013, "Sinkhorn distances"). The potentials are kept as logarithms; the scalings u, v
are folded into them before they leave the range of a double ("absorption": Schmitzer 2019, "Stabilized sparse scaling
algorithms"): as stable as iterations on logarithms, without an exponential per entry and iteration.

Positions are worked on side by side, one per lane of the vector registers; a lane whose position has converged takes
the next one, so that a slow position holds nobody up.

Shape legend: P positions, N source candidates, M target candidates, L lanes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_core.compiled import compiled

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]

_LANES = 16
_LARGEST_SCALING = 1e60
_DISTINCT = 1e-9
"""Entries closer than this (relative) are equal, and the first counts as the largest."""


class LargestEntries(NamedTuple):
    """The largest entry of every row of every position's plan: where it is (-1 for rows without mass) and its mass.

    `iterations` says how many each position took; those that missed the threshold have the maximum.
    """

    column: Int64  # [P, N]
    mass: Float64  # [P, N]
    iterations: Int64  # [P]


class _Lanes(NamedTuple):
    """The problems that are being worked on. Candidates without mass have empty kernels and `idle` 1 in their place."""

    position: Int64  # [L], -1 for a lane without work
    source: Float64  # [N, L] marginals
    target: Float64  # [M, L]
    source_idle: Float64  # [N, L]
    target_idle: Float64  # [M, L]
    source_potential: Float64  # [N, L] in units of the entropy's weight
    target_potential: Float64  # [M, L]
    source_scaling: Float64  # [N, L]
    target_scaling: Float64  # [M, L]
    row_sums: Float64  # [N, L]
    column_sums: Float64  # [M, L]
    kernel: Float64  # [N, M, L]


def largest_entries(
    costs_PNM: UInt16, source_PN: Float64, target_PM: Float64, *, weight: float, threshold: float, max_iterations: int
) -> LargestEntries:
    """Solves every position's transport problem and keeps the largest entry of every row.

    Args:
        costs_PNM: cost of moving source candidate n to target candidate m.
        source_PN, target_PM: marginals, each with sum 1; candidates of mass 0 take no part.
        weight: w, the weight of the entropy.
        threshold: a position is finished when no row of its plan misses its marginal by more.
        max_iterations: a position is finished then at the latest.
    """
    (num_n, num_m), shape = costs_PNM.shape[1:], (costs_PNM.shape[1], costs_PNM.shape[2], _LANES)
    sides = [np.empty((size, _LANES)) for size in (num_n, num_m) * 5]
    lanes = _Lanes(np.full(_LANES, -1), *sides, np.zeros(shape))
    return LargestEntries(*_solve(costs_PNM, source_PN, target_PM, weight, threshold, max_iterations, lanes))


@compiled
def _solve(
    costs_PNM: UInt16,
    source_PN: Float64,
    target_PM: Float64,
    weight: float,
    threshold: float,
    max_iterations: int,
    lanes: _Lanes,
) -> tuple[Int64, Float64, Int64]:
    num_positions, num_n, num_m = costs_PNM.shape
    column_PN = np.full((num_positions, num_n), -1, np.int64)
    mass_PN = np.zeros((num_positions, num_n), np.float64)
    iterations_P = np.zeros(num_positions, np.int64)
    missed_L, extreme_L, terms = np.zeros(_LANES), np.zeros(_LANES), np.empty(max(num_n, num_m))
    following, busy = 0, 0
    for lane in range(_LANES):
        _clear(lanes, lane)
    while busy > 0 or following < num_positions:
        for lane in range(_LANES):
            if lanes.position[lane] >= 0:
                continue
            while following < num_positions and lanes.position[lane] < 0:
                if source_PN[following].max() > 0 and target_PM[following].max() > 0:
                    lanes.position[lane] = following
                    _start(lanes, lane, costs_PNM[following], source_PN[following], target_PM[following], weight, terms)
                    iterations_P[following] = 1
                    busy += 1
                following += 1
        _sum_rows(lanes.kernel, lanes.target_scaling, lanes.source_idle, lanes.row_sums)
        _missed(lanes.source_scaling, lanes.row_sums, lanes.source, missed_L)
        for lane in range(_LANES):
            p = lanes.position[lane]
            if p >= 0 and (missed_L[lane] <= threshold or iterations_P[p] >= max_iterations):
                _finish(lanes, lane, column_PN[p], mass_PN[p])
                _clear(lanes, lane)
                busy -= 1
        np.divide(lanes.source, lanes.row_sums, lanes.source_scaling)
        _sum_columns(lanes.kernel, lanes.source_scaling, lanes.target_idle, lanes.column_sums)
        np.divide(lanes.target, lanes.column_sums, lanes.target_scaling)
        _extremes(lanes, extreme_L)
        for lane in range(_LANES):
            if lanes.position[lane] >= 0:
                iterations_P[lanes.position[lane]] += 1
                if extreme_L[lane] > _LARGEST_SCALING:
                    _absorb(lanes, lane, costs_PNM[lanes.position[lane]], weight)
    return column_PN, mass_PN, iterations_P


@compiled
def _clear(lanes: _Lanes, lane: int) -> None:
    lanes.position[lane] = -1
    lanes.source[:, lane], lanes.source_idle[:, lane], lanes.source_scaling[:, lane] = 0.0, 1.0, 0.0
    lanes.target[:, lane], lanes.target_idle[:, lane], lanes.target_scaling[:, lane] = 0.0, 1.0, 0.0
    lanes.kernel[:, :, lane] = 0.0


@compiled
def _start(
    lanes: _Lanes, lane: int, costs_NM: UInt16, source_N: Float64, target_M: Float64, weight: float, terms: Float64
) -> None:
    """Takes a position up with its first iteration done, in logarithms throughout.

    From then on no row or column vanishes in rounding: a scaling shrinks a row at most by the marginals.
    """
    for n in range(source_N.shape[0]):
        if source_N[n] > 0:
            used = 0
            for m in range(target_M.shape[0]):
                if target_M[m] > 0:
                    terms[used] = -(costs_NM[n, m] / weight)
                    used += 1
            lanes.source_potential[n, lane] = math.log(source_N[n]) - _log_sum_exp(terms[:used])
            lanes.source[n, lane], lanes.source_idle[n, lane], lanes.source_scaling[n, lane] = source_N[n], 0.0, 1.0
    for m in range(target_M.shape[0]):
        if target_M[m] > 0:
            used = 0
            for n in range(source_N.shape[0]):
                if source_N[n] > 0:
                    terms[used] = lanes.source_potential[n, lane] - costs_NM[n, m] / weight
                    used += 1
            lanes.target_potential[m, lane] = math.log(target_M[m]) - _log_sum_exp(terms[:used])
            lanes.target[m, lane], lanes.target_idle[m, lane], lanes.target_scaling[m, lane] = target_M[m], 0.0, 1.0
    _absorb(lanes, lane, costs_NM, weight)


@compiled
def _log_sum_exp(terms: Float64) -> float:
    highest = terms.max()
    total = 0.0
    for term in terms:
        total += math.exp(term - highest)
    return float(highest + math.log(total))


@compiled
def _absorb(lanes: _Lanes, lane: int, costs_NM: UInt16, weight: float) -> None:
    """Folds a lane's scalings into its potentials and rebuilds its kernel."""
    for n in range(costs_NM.shape[0]):
        if lanes.source_idle[n, lane] == 0:
            lanes.source_potential[n, lane] += math.log(lanes.source_scaling[n, lane])
            lanes.source_scaling[n, lane] = 1.0
    for m in range(costs_NM.shape[1]):
        if lanes.target_idle[m, lane] == 0:
            lanes.target_potential[m, lane] += math.log(lanes.target_scaling[m, lane])
            lanes.target_scaling[m, lane] = 1.0
            for n in range(costs_NM.shape[0]):
                if lanes.source_idle[n, lane] == 0:
                    potential = lanes.source_potential[n, lane] + lanes.target_potential[m, lane]
                    lanes.kernel[n, m, lane] = math.exp(potential - costs_NM[n, m] / weight)


# The loops below run in vector registers: the innermost one has a constant length and touches few arrays.
@compiled
def _sum_rows(kernel_NML: Float64, scaling_ML: Float64, idle_NL: Float64, sums_NL: Float64) -> None:
    for n in range(kernel_NML.shape[0]):
        for lane in range(_LANES):
            sums_NL[n, lane] = idle_NL[n, lane]
        for m in range(kernel_NML.shape[1]):
            for lane in range(_LANES):
                sums_NL[n, lane] += kernel_NML[n, m, lane] * scaling_ML[m, lane]


@compiled
def _sum_columns(kernel_NML: Float64, scaling_NL: Float64, idle_ML: Float64, sums_ML: Float64) -> None:
    for m in range(kernel_NML.shape[1]):
        for lane in range(_LANES):
            sums_ML[m, lane] = idle_ML[m, lane]
        for n in range(kernel_NML.shape[0]):
            for lane in range(_LANES):
                sums_ML[m, lane] += kernel_NML[n, m, lane] * scaling_NL[n, lane]


@compiled
def _missed(scaling_NL: Float64, sums_NL: Float64, source_NL: Float64, missed_L: Float64) -> None:
    missed_L[:] = 0.0
    for n in range(source_NL.shape[0]):
        for lane in range(_LANES):
            miss = abs(scaling_NL[n, lane] * sums_NL[n, lane] - source_NL[n, lane])
            missed_L[lane] = miss if miss > missed_L[lane] else missed_L[lane]


@compiled
def _extremes(lanes: _Lanes, extreme_L: Float64) -> None:
    """The largest factor by which a scaling of the lane is away from 1."""
    for lane in range(_LANES):
        largest = smallest = 1.0
        for n in range(lanes.source.shape[0]):
            scaling = lanes.source_scaling[n, lane] + lanes.source_idle[n, lane]
            largest, smallest = max(largest, scaling), min(smallest, scaling)
        for m in range(lanes.target.shape[0]):
            scaling = lanes.target_scaling[m, lane] + lanes.target_idle[m, lane]
            largest, smallest = max(largest, scaling), min(smallest, scaling)
        extreme_L[lane] = max(largest, 1.0 / smallest)


@compiled
def _finish(lanes: _Lanes, lane: int, column_N: Int64, mass_N: Float64) -> None:
    for n in range(lanes.source.shape[0]):
        if lanes.source_idle[n, lane] == 1:
            continue
        for m in range(lanes.target.shape[0]):
            mass = lanes.source_scaling[n, lane] * lanes.kernel[n, m, lane] * lanes.target_scaling[m, lane]
            if mass > mass_N[n] * (1 + _DISTINCT):
                column_N[n], mass_N[n] = m, mass
