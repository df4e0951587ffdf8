"""The verdict on an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one answer.

    Attributes:
        right: whether the answer fulfils all that was asked.
        score: share of what was asked that it fulfils, 0 to 1; 1 exactly when it is right.
        reason: for people: what is wrong, empty for a right answer. Nothing may depend on its wording.
    """

    right: bool
    score: float
    reason: str = ""


def passed() -> Verdict:
    """Return the verdict on a right answer."""
    return Verdict(True, 1.0)


def failed(reason: str, score: float = 0.0) -> Verdict:
    """Return the verdict on a wrong answer; `score` below 1."""
    assert 0 <= score < 1, score
    return Verdict(False, score, reason)
