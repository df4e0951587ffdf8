"""Items of evaluation suites in documents: n-grams of words in common, counted by the words that they cover.

An item of at least `ngram` words is found where runs of so many words that both have cover `share` of it (Brown et al.
2020 take any one run; a share keeps documents that quote a common phrase). A shorter item must occur as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from services.base.errors import SettingError
from services.corpus.cleaning.config import CurateConfig, DecontaminateConfig
from services.corpus.cleaning.filtering import Judge
from services.corpus.cleaning.inputs import InputFile, input_files
from services.corpus.cleaning.shards import Drop, RawDocument
from services.corpus.cleaning.tally import Tally

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def read_items(config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    """Yield name and text of every item of the suites."""
    for file in input_files(config.suites, "decontaminate.suites"):
        if file.suffix == ".txt":
            with file.open() as stream:
                for index, line in enumerate(stream):
                    yield f"{file.name}#{index}", line.decode("utf-8", "replace")
        elif file.suffix in {".jsonl", ".ndjson", ".parquet"}:
            yield from _rows(file, config)
        else:
            raise SettingError("decontaminate.suites", f"{file.name} is none of .txt, .jsonl, .parquet")


def _rows(file: InputFile, config: DecontaminateConfig) -> Iterator[tuple[str, str]]:
    with file.open() as stream:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(stream).to_pylist()
        else:
            try:
                rows = [json.loads(line) for line in stream if line.strip()]
            except ValueError as error:
                raise ValueError(f"{file.location}: not JSON lines: {error}") from error
    for index, row in enumerate(rows):
        found = [name for name in config.fields if isinstance(row, dict) and isinstance(row.get(name), str)]
        if not found:
            raise SettingError(
                "decontaminate.fields", f"{file.name}, row {index} has none of {', '.join(config.fields)}"
            )
        for name in found:
            yield f"{file.name}#{index}.{name}", row[name]


class SuiteIndex:
    """The n-grams of all items, as sorted hashes with their places.

    Attributes:
        num_too_short: items with fewer words than `min_words`, which are not looked for.
    """

    def __init__(self, config: DecontaminateConfig) -> None:
        from services.corpus.cleaning.steps.words import plain_words

        self._share, self.num_too_short = config.share, 0
        self._names: list[str] = []
        self._ids: dict[str, int] = {}
        lengths: list[int] = []
        grams: dict[int, list[tuple[int, np.ndarray]]] = {}
        for name, text in read_items(config):
            words = plain_words(text)
            if len(words) < config.min_words:
                self.num_too_short += 1
                continue
            ids_T = np.array([self._ids.setdefault(word, len(self._ids) + 1) for word in words], np.uint64)
            size = min(config.ngram, len(words))
            grams.setdefault(size, []).append((len(self._names), _grams(ids_T, size)))
            lengths.append(len(words))
            self._names.append(name)
        self._lengths = np.array(lengths, np.int64)
        self._tables = {size: _table(parts) for size, parts in sorted(grams.items())}

    def find(self, text: str) -> tuple[str, float] | None:
        """Return the item that a text covers most, and the share of its words; None when none reaches the share."""
        from services.corpus.cleaning.steps.words import plain_words

        known = self._ids
        ids_T = np.array([known.get(word, 0) for word in plain_words(text)], np.uint64)
        found = [(size, *hit) for size, table in self._tables.items() if (hit := _hits(ids_T, size, *table))]
        best: tuple[float, int] | None = None
        for size, items_P, places_P in found:
            for item in np.unique(items_P).tolist():
                starts = np.unique(places_P[items_P == item])
                covered = size + int(np.minimum(np.diff(starts), size).sum())
                share = covered / int(self._lengths[item])
                if share >= self._share and (best is None or (share, -item) > (best[0], -best[1])):
                    best = share, item
        return None if best is None else (self._names[best[1]], best[0])


Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def _grams(ids_T: np.ndarray, size: int) -> np.ndarray:
    """Return a hash for every run of `size` words: a polynomial in an odd number, modulo 2^64."""
    count = len(ids_T) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        part = ids_T[offset : offset + count] * _FACTOR
        hashes = (hashes ^ (part ^ (part >> np.uint64(29)))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes


def _table(parts: list[tuple[int, np.ndarray]]) -> Table:
    """Return hashes, items and places in the items, sorted by hash."""
    hashes = np.concatenate([grams for _, grams in parts])
    items = np.concatenate([np.full(len(grams), item) for item, grams in parts])
    places = np.concatenate([np.arange(len(grams)) for _, grams in parts])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], items[order], places[order]


def _hits(
    ids_T: np.ndarray, size: int, hashes: np.ndarray, items: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return items and places in them of all n-grams that a text has in common with the suites; None without any."""
    if len(ids_T) < size:
        return None
    known = np.convolve(ids_T > 0, np.ones(size, np.int64), "valid") == size
    if not known.any():
        return None
    grams = np.unique(_grams(ids_T, size)[known])
    low, high = np.searchsorted(hashes, grams, "left"), np.searchsorted(hashes, grams, "right")
    counts = high - low
    if not counts.any():
        return None
    starts = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    at = np.arange(counts.sum()) + starts
    return items[at], places[at]


@dataclass(frozen=True, slots=True)
class Decontaminate:
    """Drops the documents that hold an item of a suite."""

    config: DecontaminateConfig
    identity: str

    def open(self, task: int) -> Judge:
        index = _index(self.config, self.identity)

        def judge(documents: list[RawDocument], tally: Tally) -> list[Drop | None]:
            if task == 0 and index.num_too_short:
                tally.notes["items_too_short"] = index.num_too_short
            found = (index.find(document.text) for document in documents)
            return [hit and Drop("in_suite", f"{hit[1]:.0%} of {hit[0]}") for hit in found]

        return judge


@cache
def _index(config: DecontaminateConfig, identity: str) -> SuiteIndex:
    """Return the index of suites, built once in a process for the files with that identity."""
    return SuiteIndex(config)


def check_suites(config: CurateConfig) -> None:
    """Raise SettingError when the suites cannot be read, or hold no item that is long enough."""
    if config.decontaminate is not None and not any(True for _ in read_items(config.decontaminate)):
        raise SettingError("decontaminate.suites", "there are no items in them")
