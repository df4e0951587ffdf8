"""What an enumeration of the source's continuations gives at one position, and the tally that leads there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fusion_core.arrays import Float64, Int32


@dataclass(frozen=True, slots=True, eq=False)
class FirstTokenReference:
    """The target's next token at one position, as the source's own continuations decide it.

    Attributes:
        probs_U: float64 probability of every target id, as far as it is decided.
        outside: mass of continuations that no target token can start (control tokens, text the target rewrites).
        undecided: mass that was left open by `min_mass`, `max_tokens`, `max_calls` or `ignore_share`.
        undecided_after_one: mass of first source tokens whose bytes alone do not decide; with `given`, also that of
            splits into other source tokens than the realised ones. No projection that looks at one source token can
            be surer than that: its total variation from the truth is at most this mass.
        num_calls: prefixes that the source was asked for.
        guessed_U: float64, of the undecided mass what was looked at, each continuation's at the first token of its own
            target tokenisation.
        looked_at_U: float64, what a projection makes of those first source tokens that were looked at, on the scale
            on which all first source tokens together have the mass `first_mass`.
        first_mass: see there.

    probs_U, `outside` and `undecided` sum to one.
    """

    probs_U: Float64
    outside: float
    undecided: float
    undecided_after_one: float
    num_calls: int
    guessed_U: Float64
    looked_at_U: Float64
    first_mass: float

    def total_variation(self, probs_U: Float64) -> float:
        """Distance of a distribution over target ids (its tail is what is missing to one) to this one.

        Undecided mass counts as a deviation unless it meets tail.
        """
        tail = max(0.0, 1.0 - float(probs_U.sum()))
        off = np.abs(probs_U - self.probs_U).sum() + abs(tail - self.outside - self.undecided)
        return float(off) / 2.0

    def completed(self, projected_U: Float64) -> Float64:
        """float64 [U]: a projection's row with all that was enumerated put in place of what the projection guessed.

        For models too large to decide everything: mass that was never looked at stays where the row from full
        vocabularies has it, the rest of the undecided mass where its text so far points. What is missing to one is
        outside of the target's vocabulary.
        """
        kept_U = np.maximum(projected_U * self.first_mass - self.looked_at_U, 0.0)
        completed_U = self.probs_U + self.guessed_U + kept_U
        result: Float64 = completed_U / (completed_U.sum() + self.outside)
        return result


class Node(NamedTuple):
    """A continuation whose bytes do not decide yet."""

    tokens: tuple[int, ...]
    text: bytes
    mass: float
    guess: int
    """First target token of the text so far; -1 for none."""
    on_path: bool
    """Whether its tokens are the realised ones, within the given target tokens."""
    beside: bool
    """Whether it began with other tokens than the realised ones that ended within the given target tokens."""


@dataclass(slots=True)
class Tally:
    """Masses found so far, not yet scaled to sum to one."""

    probs_U: Float64
    guessed_U: Float64
    looked_at_U: Float64
    outside: float = 0.0
    undecided: float = 0.0
    first_decided: float = 0.0
    first_undecided: float = 0.0
    first_mass: float = 0.0
    beside: float = 0.0
    num_calls: int = 0
    heap: list[tuple[float, int, Node]] = field(default_factory=list)

    def decide(self, ids: Int32, masses: Float64) -> None:
        np.add.at(self.probs_U, ids[ids >= 0], masses[ids >= 0])
        self.outside += float(masses[ids == -1].sum())

    def leave(self, node: Node, mass: float | None = None) -> None:
        """Counts a continuation, or a part of its mass, as undecided."""
        mass = node.mass if mass is None else mass
        self.undecided += mass
        if node.guess >= 0:
            self.guessed_U[node.guess] += mass
        if node.beside:
            self.beside += mass

    def scaled(self, asked: str) -> FirstTokenReference:
        """Return the masses scaled to sum to one. Raises ValueError, with `asked`, where there are none."""
        total = float(self.probs_U.sum()) + self.outside + self.undecided
        if total <= 0.0:
            raise ValueError(f"{asked}: the source gives no mass to such continuations")
        unsure = self.first_undecided + self.beside
        return FirstTokenReference(
            probs_U=self.probs_U / total,
            outside=self.outside / total,
            undecided=self.undecided / total,
            undecided_after_one=unsure / (self.first_decided + unsure),
            num_calls=self.num_calls,
            guessed_U=self.guessed_U / total,
            looked_at_U=self.looked_at_U / total,
            first_mass=self.first_mass / total,
        )
