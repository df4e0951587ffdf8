"""Weights that follow the text: online expectation maximisation (Cappé and Moulines 2009) over one window.

A row is weighed by v, which is the prior at the window's start. Behind the row v becomes (1 - rate) v + rate r, where r
is the posterior of the sources given the realised token, r_s = v_s p_s / sum of v p. A row's weights depend on the
tokens before it only, so that the mixture is a code of the text, unlike one that is weighed by the window's own loss.

Sources that lack a row keep their v; the others share theirs by the posterior among them (Freund et al. 1997,
"specialists"). A row that nobody has, or that all find impossible, changes nothing.

Shape legend: S sources that answered, T target tokens.
"""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Bool, Float64
from fusion_core.compiled import compiled


def online_weights(prior_S: Float64, gold_ST: Float64, usable_ST: Bool, rate: float) -> Float64:
    """Return every source's weight in every row, [S, T], before masks.

    Args:
        prior_S: weights in the first row, which sum to one.
        gold_ST: log-probability of the realised target tokens.
        usable_ST: True at the rows that a source has.
        rate: share of the posterior in the next row's weights.
    """
    weight_ST = np.empty(gold_ST.shape)
    _follow(prior_S, gold_ST, usable_ST, rate, weight_ST)
    return weight_ST


@compiled
def _follow(prior_S: Float64, gold_ST: Float64, usable_ST: Bool, rate: float, weight_ST: Float64) -> None:
    """Fill the last array row by row."""
    num_sources, num_tokens = gold_ST.shape
    now_S, joint_S = prior_S.copy(), np.zeros(num_sources)
    for t in range(num_tokens):
        highest, mass = -np.inf, 0.0
        for s in range(num_sources):
            weight_ST[s, t] = now_S[s]
            if usable_ST[s, t] and now_S[s] > 0.0:
                mass += now_S[s]
                highest = max(highest, gold_ST[s, t])
        if highest == -np.inf:
            continue
        total = 0.0
        for s in range(num_sources):
            joint_S[s] = now_S[s] * np.exp(gold_ST[s, t] - highest) if usable_ST[s, t] and now_S[s] > 0.0 else 0.0
            total += joint_S[s]
        for s in range(num_sources):
            if usable_ST[s, t]:
                now_S[s] = (1.0 - rate) * now_S[s] + rate * mass * joint_S[s] / total
