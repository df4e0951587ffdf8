"""Pearson's chi-square test of sampled ids against their probabilities, with few draws for many ids."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from fusion_core.arrays import Float64


def chi_square(counts: Counter[int], probabilities: Float64, total: int) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; ids share a cell until at least ten are expected in it."""
    statistic, num_cells, observed, expected = 0.0, 0, 0, 0.0
    for i in np.argsort(-probabilities):
        observed, expected = observed + counts[int(i)], expected + float(probabilities[i]) * total
        if expected >= 10:
            statistic, num_cells = statistic + (observed - expected) ** 2 / expected, num_cells + 1
            observed, expected = 0, 0.0
    return statistic, num_cells - 1


def standard_deviations(statistic: float, degrees: int) -> float:
    """Return how far a statistic lies above its mean, as a normal deviate (Wilson and Hilferty's approximation).

    A true hypothesis exceeds 3.09 with probability 0.001.
    """
    part = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - part)) / math.sqrt(part)
