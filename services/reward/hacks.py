"""Reward hacks: answers that score high for what nobody wished, found in scored samples, and the pairs that patch them.

InternLM2 (arXiv:2403.17297, section 4.2.2) mends a reward model between rounds of reinforcement learning with 20 to 100
preference pairs against the pattern that a round brought to light. A pattern is found here where a suspicious answer
scores above a clean one to the same prompt; the pair says that it should not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from services.reward.pairs import Pair
from services.wire.messages import Message

_WORDS = re.compile(r"\w+(?:['’]\w+)*")
_LONGER = 2.0
"""Factor over the usual length from which an answer is suspiciously long."""
_LEAST_TRIGRAMS = 12
_DISTINCT_SHARE = 0.5
"""Share of different ones among the runs of three words below which an answer repeats itself."""
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am|we['’]?re) (?:very |so |really )?(?:sorry|afraid|unable)|"
    r"i (?:can(?:no|['’])t|cannot|won['’]t|will not|am not able)|sorry\b|unfortunately,? i\b|as an ai\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A sampled answer with its score; `right` is the verdict of a verifier, None where none has judged."""

    messages: Sequence[Message]
    answer: str
    domain: str
    score: float
    right: bool | None = None


Detector: TypeAlias = Callable[[Judged, float], bool]
"""A function that tells whether an answer is suspicious; its second argument is the usual number of words."""

DETECTORS: dict[str, Detector] = {
    "length": lambda judged, usual_words: num_words(judged.answer) > _LONGER * usual_words,
    "repetition": lambda judged, _: repeats_itself(judged.answer),
    "refusal": lambda judged, _: _REFUSAL.match(judged.answer) is not None,
    "verifier": lambda judged, _: judged.right is False,
}
"""The detectors by name. An answer that fails any of those asked for is not a clean one."""


@dataclass(frozen=True, slots=True)
class Incident:
    """What one detector found.

    Attributes:
        detector: its name.
        answers: suspicious answers among the samples.
        prompts: prompts to which a suspicious answer scores above a clean one.
        pairs: for each of these prompts the clean answer with the highest score, preferred to the suspicious one with
            the highest score.
    """

    detector: str
    answers: int
    prompts: int
    pairs: tuple[Pair, ...]


def find_hacks(
    samples: Iterable[Judged], detectors: Sequence[str] = tuple(DETECTORS), *, usual_words: float | None = None
) -> list[Incident]:
    """Return what each detector found in samples, several to a prompt.

    `usual_words` is the length of an answer before any tuning, by default the median of the samples. Raises ValueError
    for an unknown detector.
    """
    if unknown := sorted(set(detectors) - set(DETECTORS)):
        raise ValueError(f"detector: {unknown[0]!r} is none of {', '.join(DETECTORS)}")
    groups = _by_prompt(samples)
    usual = usual_words or median([num_words(judged.answer) for group in groups for judged in group] or [0])
    marks = [[{name for name in detectors if DETECTORS[name](judged, usual)} for judged in group] for group in groups]
    return [_incident(name, groups, marks) for name in detectors]


def num_words(text: str) -> int:
    """Return the number of words in a text."""
    return sum(1 for _ in _WORDS.finditer(text))


def repeats_itself(text: str) -> bool:
    """Return whether most runs of three words in a text occur before in it; short texts never do."""
    words = [word.lower() for word in _WORDS.findall(text)]
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(runs) >= _LEAST_TRIGRAMS and len(set(runs)) < _DISTINCT_SHARE * len(runs)


def _by_prompt(samples: Iterable[Judged]) -> list[list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for judged in samples:
        key = json.dumps([list(judged.messages), judged.domain], sort_keys=True)
        groups.setdefault(key, []).append(judged)
    return list(groups.values())


def _incident(detector: str, groups: Sequence[Sequence[Judged]], marks: Sequence[Sequence[set[str]]]) -> Incident:
    pairs, answers = [], 0
    for group, found in zip(groups, marks, strict=True):
        suspicious = [judged for judged, names in zip(group, found, strict=True) if detector in names]
        clean = [judged for judged, names in zip(group, found, strict=True) if not names]
        answers += len(suspicious)
        if suspicious and clean:
            worst = max(suspicious, key=lambda judged: judged.score)
            best = max(clean, key=lambda judged: judged.score)
            if worst.score > best.score and worst.answer != best.answer:
                pairs.append(Pair(list(best.messages), best.answer, worst.answer, best.domain))
    return Incident(detector, answers, len(pairs), tuple(pairs))
