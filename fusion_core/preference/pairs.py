"""Judged answers as training data: the best of a prompt for SFT, and pairs for preference tuning.

Everything is a function of the answers alone: their order, and what other prompts there are, changes no choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

PairRule: TypeAlias = Literal["within_source", "right_and_wrong"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A judged answer to one prompt.

    Attributes:
        prompt: key of the prompt; answers with the same key compete.
        source: name of the model that gave it.
        number: number of the answer among those of its source to this prompt.
        text: the answer.
        score: the judge's; only scores of one judge are compared.
        right: whether the answer is right; None by a judge that does not know.
    """

    prompt: str
    source: str
    number: int
    text: str
    score: float
    right: bool | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt."""

    chosen: Candidate
    rejected: Candidate

    @property
    def gap(self) -> float:
        """The difference of the scores."""
        return self.chosen.score - self.rejected.score


def best_of(
    candidates: Iterable[Candidate], *, least_score: float | None = None, per_prompt: int = 1
) -> list[Candidate]:
    """Return the best answers to every prompt over all sources, prompts in the order of their first answer.

    Answers below `least_score` are left out; where it is not set, those that the judge calls wrong. Blank answers are
    left out, equal texts count once.
    """
    chosen = []
    for answers in _by_prompt(candidates).values():
        if least_score is None:
            good = [answer for answer in answers if answer.right is not False]
        else:
            good = [answer for answer in answers if answer.score >= least_score]
        chosen += _ranked(good)[:per_prompt]
    return chosen


def preference_pairs(
    candidates: Iterable[Candidate],
    rule: PairRule,
    *,
    least_gap: float,
    most_gap: float | None = None,
    per_prompt: int = 1,
) -> list[Pair]:
    """Return pairs of answers, prompts in the order of their first answer.

    Args:
        candidates: judged answers.
        rule: `within_source` pairs the best and the worst answer of one source (FuseChat-3.0: sources differ in style,
            which a pair across them would teach); `right_and_wrong` pairs a right with a wrong one, of any source.
        least_gap: least difference of the scores; ties make no pair.
        most_gap: largest difference, above which a pair teaches nothing that is not obvious; no bound when not set.
        per_prompt: most pairs of a prompt, the widest gaps first.
    """
    pairs = []
    for answers in _by_prompt(candidates).values():
        found = _within_sources(answers) if rule == "within_source" else _right_and_wrong(answers)
        fitting = [
            pair
            for pair in found
            if pair.gap >= least_gap and pair.gap > 0 and (most_gap is None or pair.gap <= most_gap)
        ]
        fitting.sort(key=lambda pair: (-pair.gap, _mark(pair.chosen), _mark(pair.rejected)))
        pairs += fitting[:per_prompt]
    return pairs


def capped(keys: Sequence[str], most: int | None) -> list[int]:
    """Return the places of at most so many keys, in order: those with the smallest hashes, whatever else is there."""
    if most is None or len(keys) <= most:
        return list(range(len(keys)))
    by_hash = sorted(range(len(keys)), key=lambda place: (hashlib.sha256(keys[place].encode()).digest(), place))
    return sorted(by_hash[:most])


def _by_prompt(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.prompt, []).append(candidate)
    return groups


def _ranked(answers: Iterable[Candidate]) -> list[Candidate]:
    """Return different texts that are not blank, the best first; equal scores are ordered by hash."""
    best: dict[str, Candidate] = {}
    for answer in sorted(answers, key=lambda answer: (-answer.score, _mark(answer))):
        if text := answer.text.strip():
            best.setdefault(text, answer)
    return list(best.values())


def _within_sources(answers: Sequence[Candidate]) -> Iterable[Pair]:
    for source in sorted({answer.source for answer in answers}):
        ranked = _ranked(answer for answer in answers if answer.source == source)
        yield from (Pair(better, worse) for better, worse in combinations(ranked, 2))


def _right_and_wrong(answers: Sequence[Candidate]) -> Iterable[Pair]:
    ranked = _ranked(answers)
    for right in (answer for answer in ranked if answer.right is True):
        yield from (Pair(right, wrong) for wrong in ranked if wrong.right is False)


def _mark(answer: Candidate) -> bytes:
    """Return a hash that orders answers of the same score, and prefers no source and no number."""
    return hashlib.sha256(f"{answer.prompt}\0{answer.source}\0{answer.number}\0{answer.text}".encode()).digest()
