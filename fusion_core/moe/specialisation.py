"""What the experts of a layer tell of the texts that they get: load by kind of text, and mutual information.

The information between the expert e of a token and the kind d of its text, in nats,

    I = sum over d and e of p(d, e) log(p(d, e) / (p(d) p(e)))

is above 0 for any finite text, experts that know nothing of kinds included. What tells is the same figure where whole
documents got the kind of another document: tokens of one document resemble each other, so they move together.

Shape legend: L layers, E experts of a layer, D documents, K kinds, R permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Float64

_PERMUTATIONS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Specialisation:
    """The experts of every layer and the kinds of text.

    Attributes:
        kinds: their names.
        load_LKE: load of an expert by tokens of a kind, 1 when the kind is spread evenly.
        information_L: mutual information in nats.
        shuffled_L, shuffled_high_L: its mean and 95th percentile over permutations of the documents' kinds.
    """

    kinds: tuple[str, ...]
    load_LKE: Float64
    information_L: Float64
    shuffled_L: Float64
    shuffled_high_L: Float64


def specialisation(
    counts_DLE: Float64, kinds: Sequence[str], *, permutations: int = _PERMUTATIONS, seed: int = 0
) -> Specialisation:
    """Return how the experts' tokens differ by kind, from the tokens that each expert got of every document.

    `kinds` names the kind of each document.
    """
    names = tuple(sorted(set(kinds)))
    kind_D = np.array([names.index(kind) for kind in kinds])
    rng = np.random.default_rng(seed)
    counts_LKE = _by_kind(counts_DLE, kind_D, len(names))
    drawn_RL = np.stack(
        [mutual_information(_by_kind(counts_DLE, rng.permutation(kind_D), len(names))) for _ in range(permutations)]
    )
    mean_LK1 = np.maximum(counts_LKE.mean(axis=2, keepdims=True), 1e-300)
    return Specialisation(
        names,
        counts_LKE / mean_LK1,
        mutual_information(counts_LKE),
        drawn_RL.mean(axis=0),
        np.percentile(drawn_RL, 95, axis=0),
    )


def mutual_information(counts_LKE: Float64) -> Float64:
    """Return the mutual information of every layer in nats, [L], from the tokens of each kind that each expert got."""
    joint_LKE = counts_LKE / counts_LKE.sum(axis=(1, 2), keepdims=True)
    apart_LKE = joint_LKE.sum(axis=2, keepdims=True) * joint_LKE.sum(axis=1, keepdims=True)
    ratio_LKE = np.divide(joint_LKE, apart_LKE, out=np.ones_like(joint_LKE), where=joint_LKE > 0)
    return np.asarray((joint_LKE * np.log(ratio_LKE)).sum(axis=(1, 2)))


def _by_kind(counts_DLE: Float64, kind_D: np.ndarray, num_kinds: int) -> Float64:
    is_kind_KD = np.equal.outer(np.arange(num_kinds), kind_D).astype(np.float64)
    return np.asarray(np.einsum("kd,dle->lke", is_kind_KD, counts_DLE, optimize=True))
