"""Cloze questions from documents: which of four words stood there? A task for lm-evaluation-harness.

A question is the text before a word, and four ways to go on: the word or one of three others in its place, each with
what follows it in its sentence. The others are words of the same domain that are about as frequent and as long, so that
a model cannot choose by frequency alone. Chance is right at one question in four.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from services.base.atomic import write_whole
from services.corpus.ledger import Window

_WORD = re.compile(r"(?<= )[^\W\d_]{4,}\b")
_END = re.compile(r"[.!?。！？\n]")
_MIN_BEFORE, _MAX_BEFORE, _MAX_BEHIND = 80, 600, 120
"""Characters before a word and behind it."""
_FREQUENT = 50
"""Most frequent words of a domain, at most a tenth of them, that are never asked for: they are mostly of grammar."""
_NEAR, _NUM_OTHERS = 24, 3
"""Words that are near in frequency and length, and the number of them that are drawn."""


@dataclass(frozen=True, slots=True)
class Question:
    """A cloze question: `context` and the right one of `choices` are text of the document."""

    document: str
    domain: str
    context: str
    choices: tuple[str, ...]
    answer: int


def cloze_questions(windows: Sequence[Window], *, per_document: int, seed: int) -> list[Question]:
    """Return up to `per_document` questions of each document, the same ones for the same windows and seed."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_document: defaultdict[str, list[Window]] = defaultdict(list)
    for window in windows:
        counts[window.domain].update(_WORD.findall(_text(window)))
        by_document[window.document].append(window)
    words = {domain: _Words(of_domain) for domain, of_domain in counts.items()}
    questions = list[Question]()
    for document, of_document in by_document.items():
        rng = random.Random(f"{seed}:{document}")
        questions += _of_document(of_document, words[of_document[0].domain], per_document, rng)
    return questions


def write_cloze_tasks(questions: Iterable[Question], folder: Path) -> dict[str, int]:
    """Write a task file and its questions for every domain; return the number of questions by the task's name.

    The harness scores `acc`, and `acc_norm` by the choices' bytes. Raises ValueError when there is no question, or when
    two domains would give one name.
    """
    by_domain: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_domain[question.domain].append(question)
    if not by_domain:
        raise ValueError("cloze: the documents are too short for a question")
    domain_of: dict[str, str] = {}
    for domain in sorted(by_domain):
        other = domain_of.setdefault(_task_name(domain), domain)
        if other != domain:
            raise ValueError(f"cloze: the domains {other!r} and {domain!r} would both be the task {_task_name(domain)}")
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, domain in domain_of.items():
        of_domain = by_domain[domain]
        lines = [json.dumps(_record(question), ensure_ascii=False) for question in of_domain]
        data = (folder / f"{name}.jsonl").absolute()
        write_whole(data, "\n".join(lines) + "\n")
        write_whole(folder / f"{name}.yaml", yaml.safe_dump(_task(name, data), sort_keys=False))
        written[name] = len(of_domain)
    return written


class _Words:
    """The words of a domain with their counts."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        self._frequent = set(by_count[: min(_FREQUENT, len(counts) // 10)])

    def is_asked(self, word: str) -> bool:
        return word not in self._frequent

    def others(self, word: str, passage: str, rng: random.Random) -> list[str]:
        """Return words for the place of one, none of which is in the passage; fewer where there are no more."""
        count, present = self._counts[word], passage.lower()

        def distance(other: str) -> tuple[float, str]:
            return abs(math.log(self._counts[other] / count)) + abs(len(other) - len(word)) / 4, other

        fitting = (
            other
            for other in self._counts
            if other.istitle() == word.istitle() and other.isupper() == word.isupper() and other.lower() not in present
        )
        near = heapq.nsmallest(_NEAR, fitting, key=distance)
        return rng.sample(near, min(_NUM_OTHERS, len(near)))


def _of_document(windows: Sequence[Window], words: _Words, number: int, rng: random.Random) -> Iterator[Question]:
    places = [
        (window, text, match)
        for window in windows
        for text in [_text(window)]
        for match in _WORD.finditer(text)
        if match.start() > _MIN_BEFORE and words.is_asked(match[0])
    ]
    rng.shuffle(places)
    for window, text, match in places:
        if number == 0:
            return
        before = _last_words(text[: match.start() - 1])
        behind = _rest_of_sentence(text, match.end())
        others = words.others(match[0], before + match[0] + behind, rng)
        if len(others) < _NUM_OTHERS:
            continue
        choices = [match[0], *others]
        rng.shuffle(choices)
        written = tuple(f" {choice}{behind}" for choice in choices)
        yield Question(window.document, window.domain, before, written, choices.index(match[0]))
        number -= 1


def _text(window: Window) -> str:
    return window.text.decode("utf-8", errors="ignore")


def _last_words(text: str) -> str:
    """Return the end of a text, from the start of a word."""
    return text if len(text) <= _MAX_BEFORE else text[-_MAX_BEFORE:].partition(" ")[2]


def _rest_of_sentence(text: str, start: int) -> str:
    end = _END.search(text, start)
    return text[start : min(end.end() if end else len(text), start + _MAX_BEHIND)].rstrip("\n")


def _task_name(domain: str) -> str:
    return "cloze_" + re.sub(r"\W", "_", domain) if domain else "cloze"


def _record(question: Question) -> dict[str, object]:
    return {
        "document": question.document,
        "context": question.context,
        "choices": list(question.choices),
        "answer": question.answer,
    }


def _task(name: str, data: Path) -> dict[str, object]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _METRICS],
        "metadata": {"version": 1},
    }


_METRICS = ("acc", "acc_norm")
