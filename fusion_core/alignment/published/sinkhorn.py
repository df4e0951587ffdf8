"""Entropic optimal transport between small distributions, one problem per position.

Minimises <G, C> - w H(G) over the plans G with the given marginals. The minimum has the form
G = exp((f + g - C) / w) and is unique (Cuturi 2013, "Sinkhorn distances"). Sinkhorn's iterations scale rows and columns
in turn; at the published weight w = 1/30 they need hundreds to tens of thousands. Here they only lead in: columns are
always scaled exactly, and the row potentials f are moved by Newton steps (Brauer, Clason, Lorenz, Wirth 2017, "A
Sinkhorn-Newton method for entropic optimal transport"), while w falls to its final value in stages that start from
the potentials of the stage before. Potentials are logarithms, and every kernel is relative to them, so nothing
overflows or vanishes however large C / w is.

Shape legend: P positions, N source candidates, M target candidates; n, m those of one position with mass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fusion_core.arrays import Float64, Int64, UInt16
from fusion_core.compiled import compiled

_LEAST_MARGINAL = 1e-100
"""Least marginal of a candidate that takes part: the inverse of a smaller one, times another, overflows float64."""
_DISTINCT = 1e-9
"""Relative difference below which entries are equal, so that the first counts as the largest."""
_START, _COOLING, _STAGE_THRESHOLD = 10.0, 6.0, 1e-2
"""Stages of w: it starts at a tenth of the highest cost and falls to a sixth after each stage, solved roughly."""
_LEAD_IN = 3
"""Sinkhorn iterations at the start of a stage; a Newton step costs as much as several."""
_LONGEST_STEP, _MAX_TRIALS = 50.0, 8
"""Largest logarithm of a scaling's change in one step, and most lengths that are tried for a step."""
_LARGEST_SCALING = 1e60


@compiled
def largest_entries(
    costs_PNM: UInt16, source_PN: Float64, target_PM: Float64, weight: float, threshold: float, max_iterations: int
) -> tuple[Int64, Float64, Float64]:
    """Return the largest entry of every row of every position's transport plan.

    Args:
        costs_PNM: cost of moving source candidate n to target candidate m.
        source_PN, target_PM: marginals, each with sum 1; candidates of (next to) no mass take no part.
        weight: w, the weight of the entropy.
        threshold: largest miss of a row's marginal at which a position is finished.
        max_iterations: number of iterations after which a position is finished in any case.

    Returns:
        column_PN (-1 where the source candidate takes no part), mass_PN, and the largest miss of a marginal in
        each position: above `threshold` where `max_iterations` did not suffice.
    """
    num_positions, num_n = costs_PNM.shape[:2]
    column_PN = np.full((num_positions, num_n), -1, np.int64)
    mass_PN = np.zeros((num_positions, num_n), np.float64)
    missed_P = np.zeros(num_positions, np.float64)
    for p in range(num_positions):
        rows, columns = np.flatnonzero(source_PN[p] > _LEAST_MARGINAL), np.flatnonzero(target_PM[p] > _LEAST_MARGINAL)
        if rows.shape[0] == 0 or columns.shape[0] == 0:
            continue
        costs_nm = np.empty((rows.shape[0], columns.shape[0]))
        for i in range(rows.shape[0]):
            for j in range(columns.shape[0]):
                costs_nm[i, j] = costs_PNM[p, rows[i], columns[j]]
        plan_nm, missed_P[p] = _plan(
            costs_nm, source_PN[p][rows], target_PM[p][columns], weight, threshold, max_iterations
        )
        for i in range(rows.shape[0]):
            best, largest = 0, 0.0
            for j in range(columns.shape[0]):
                if plan_nm[i, j] > largest * (1 + _DISTINCT):
                    best, largest = j, plan_nm[i, j]
            column_PN[p, rows[i]], mass_PN[p, rows[i]] = columns[best], largest
    return column_PN, mass_PN, missed_P


class _Work(NamedTuple):
    """One position's unknowns and scratch: plan = diag(scaling_n) kernel diag(scaling_m)."""

    potential_n: Float64
    potential_m: Float64
    kernel_nm: Float64
    kernel_mn: Float64  # its transpose: both sums over it run along memory
    hessian_nn: Float64
    step_n: Float64


class _Scaled(NamedTuple):
    """Row scalings, the column scalings that make the columns exact, and the row sums that result."""

    scaling_n: Float64
    scaling_m: Float64
    sums_n: Float64


@compiled
def _plan(
    costs_nm: Float64, source_n: Float64, target_m: Float64, final_weight: float, threshold: float, max_iterations: int
) -> tuple[Float64, float]:
    n, m = costs_nm.shape
    work = _Work(np.zeros(n), np.zeros(m), np.empty((n, m)), np.empty((m, n)), np.empty((n, n)), np.zeros(n))
    now = _Scaled(np.ones(n), np.ones(m), np.empty(n))
    trial = _Scaled(np.ones(n), np.ones(m), np.empty(n))
    weight = max(final_weight, costs_nm.max() / _START)
    missed = math.inf
    iterations = 0
    while True:
        tolerance = threshold if weight == final_weight else max(threshold, _STAGE_THRESHOLD)
        rebuild, lead_in = True, _LEAD_IN
        while rebuild or (missed > tolerance and iterations < max_iterations):
            if rebuild:
                missed = _rebuild(costs_nm, source_n, target_m, weight, work, now)
            elif lead_in > 0 or not _newton(source_n, target_m, work, now, trial):
                missed = _scale_rows(source_n, target_m, work, now)
                lead_in -= 1
            else:
                now, trial = trial, now
                missed = _largest_miss(source_n, now)
            iterations += 1
            rebuild = _out_of_range(now)
            if rebuild:
                _absorb(weight, work, now)
        if weight == final_weight:
            break
        _absorb(weight, work, now)
        weight = final_weight if weight < 1.5 * final_weight * _COOLING else weight / _COOLING
    for i in range(n):
        for j in range(m):
            work.kernel_nm[i, j] *= now.scaling_n[i] * now.scaling_m[j]
    return work.kernel_nm, missed


@compiled
def _rebuild(
    costs_nm: Float64, source_n: Float64, target_m: Float64, weight: float, work: _Work, now: _Scaled
) -> float:
    """Return the kernel relative to potentials under which no row or column vanishes in rounding.

    Rows first, by the largest term of each alone (a Sinkhorn iteration would take the sum, and an exponential of every
    term), then columns exactly: that shrinks a row's largest term at most by its marginals.
    """
    n, m = costs_nm.shape
    terms, inverse = work.kernel_nm, 1.0 / weight
    for i in range(n):
        highest = -math.inf
        for j in range(m):
            highest = max(highest, work.potential_m[j] - costs_nm[i, j])
        work.potential_n[i] = weight * math.log(source_n[i]) - highest
    for j in range(m):
        highest = -math.inf
        for i in range(n):
            terms[i, j] = (work.potential_n[i] - costs_nm[i, j]) * inverse
            highest = max(highest, terms[i, j])
        total = 0.0
        for i in range(n):
            work.kernel_mn[j, i] = math.exp(terms[i, j] - highest)
            total += work.kernel_mn[j, i]
        work.potential_m[j] = weight * (math.log(target_m[j] / total) - highest)
        share = target_m[j] / total
        for i in range(n):
            work.kernel_mn[j, i] *= share
            work.kernel_nm[i, j] = work.kernel_mn[j, i]
    now.scaling_n[:] = 1.0
    return _scale_columns(source_n, target_m, work, now)


@compiled
def _absorb(weight: float, work: _Work, now: _Scaled) -> None:
    work.potential_n[:] += weight * np.log(now.scaling_n)
    work.potential_m[:] += weight * np.log(now.scaling_m)


@compiled
def _scale_columns(source_n: Float64, target_m: Float64, work: _Work, now: _Scaled) -> float:
    """Make the columns exact for the given row scalings; return the largest miss of a row's marginal."""
    n, m = work.kernel_nm.shape
    now.scaling_m[:] = 0.0
    for i in range(n):
        for j in range(m):
            now.scaling_m[j] += work.kernel_nm[i, j] * now.scaling_n[i]
    np.divide(target_m, now.scaling_m, now.scaling_m)
    now.sums_n[:] = 0.0
    for j in range(m):
        for i in range(n):
            now.sums_n[i] += work.kernel_mn[j, i] * now.scaling_m[j]
    for i in range(n):
        now.sums_n[i] *= now.scaling_n[i]
    return _largest_miss(source_n, now)


@compiled
def _largest_miss(source_n: Float64, now: _Scaled) -> float:
    missed = 0.0
    for i in range(source_n.shape[0]):
        missed = max(missed, abs(now.sums_n[i] - source_n[i]))
    return missed


@compiled
def _out_of_range(now: _Scaled) -> bool:
    largest = smallest = 1.0
    for scaling in now.scaling_n:
        largest, smallest = max(largest, scaling), min(smallest, scaling)
    return largest > _LARGEST_SCALING or smallest < 1 / _LARGEST_SCALING


@compiled
def _scale_rows(source_n: Float64, target_m: Float64, work: _Work, now: _Scaled) -> float:
    """Make one Sinkhorn iteration."""
    np.divide(source_n, now.sums_n, now.sums_n)
    now.scaling_n[:] *= now.sums_n
    return _scale_columns(source_n, target_m, work, now)


@compiled
def _newton(source_n: Float64, target_m: Float64, work: _Work, now: _Scaled, trial: _Scaled) -> bool:
    """Move the row potentials by a Newton step into `trial`; return False when no length of it is acceptable.

    The gradient is row sums minus marginal, the Hessian diag(row sums) - G diag(1 / target) G^T.
    """
    n, m = work.kernel_nm.shape
    hessian, step_n = work.hessian_nn, work.step_n
    hessian[:] = 0.0
    for j in range(m):
        for i in range(n):
            step_n[i] = now.scaling_n[i] * work.kernel_mn[j, i] * now.scaling_m[j]
        inverse = 1.0 / target_m[j]
        for i in range(n):
            share = step_n[i] * inverse
            for k in range(n):  # the upper triangle is not needed, but whole rows are faster
                hessian[i, k] -= share * step_n[k]
    for i in range(n):
        hessian[i, i] += now.sums_n[i]
    _solve_fixing_last(hessian, source_n, now.sums_n, step_n)
    slope = 0.0
    for i in range(n):
        # Each on its own: where rows hardly share columns, one huge component must not shrink the others to nothing.
        step_n[i] = min(max(step_n[i], -_LONGEST_STEP), _LONGEST_STEP)
        slope += (now.sums_n[i] - source_n[i]) * step_n[i]
    if slope >= 0:
        return False
    length = 1.0
    for _ in range(_MAX_TRIALS):
        for i in range(n):
            trial.scaling_n[i] = now.scaling_n[i] * math.exp(length * step_n[i])
        _scale_columns(source_n, target_m, work, trial)
        trial_slope = 0.0
        for i in range(n):
            trial_slope += (trial.sums_n[i] - source_n[i]) * step_n[i]
        # The objective is convex along the step: anywhere that is not steeply uphill is far enough down.
        if trial_slope <= -0.5 * slope:
            return True
        length *= min(0.7, max(0.1, slope / (slope - trial_slope)))
    return False


@compiled
def _solve_fixing_last(hessian: Float64, source_n: Float64, sums_n: Float64, step_n: Float64) -> None:
    """Solve hessian * step = source - sums in place, by Cholesky factors whose diagonal is kept as its inverse.

    The last potential stays where it is: adding a constant to all of them changes nothing.
    """
    size = source_n.shape[0] - 1
    step_n[size] = 0.0
    for i in range(size):
        for k in range(i):
            value = hessian[i, k]
            for inner in range(k):
                value -= hessian[i, inner] * hessian[k, inner]
            hessian[i, k] = value * hessian[k, k]
        pivot, step = hessian[i, i], source_n[i] - sums_n[i]
        for k in range(i):
            pivot -= hessian[i, k] * hessian[i, k]
            step -= hessian[i, k] * step_n[k]
        # A row that shares no column with another has curvature 0 up to rounding.
        hessian[i, i] = 1.0 / math.sqrt(max(pivot, 1e-14 * source_n[i]))
        step_n[i] = step * hessian[i, i]
    for i in range(size - 1, -1, -1):
        for k in range(i + 1, size):
            step_n[i] -= hessian[k, i] * step_n[k]
        step_n[i] *= hessian[i, i]
