"""A mixed heap of documents in which it is known what should go: copies, boilerplate, bad words, personal data, suites.

Everything is drawn from a seed. Documents are dealt to .jsonl, .jsonl.gz, .jsonl.zst and .parquet files in two folders.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fakes.heap.oracles import words_of

SEVERE = "zorgfluch"
PERSONAL = (
    "jane.q.public@mailhost-{n}.org", "8.8.{n}.8", "+44 20 7946 {n:04d}",
    "AKIA{n:016d}", "ghp_{n:036d}", "(212) 555-{n:04d}",
)  # fmt: skip


@dataclass
class Heap:
    """The heap as it was written.

    Attributes:
        texts: by id, as written.
        near: (copy, original, aimed Jaccard similarity).
        exact: ids of copies, of which with the original all but one go.
        boilerplate, profane: ids that should go.
        personal: id and the datum that should be replaced.
        suite: items; verbatim, reworded, partial: id and item.
    """

    texts: dict[str, str] = field(default_factory=dict)
    near: list[tuple[str, str, float]] = field(default_factory=list)
    exact: list[tuple[str, str]] = field(default_factory=list)
    boilerplate: list[str] = field(default_factory=list)
    profane: list[str] = field(default_factory=list)
    personal: list[tuple[str, str]] = field(default_factory=list)
    suite: list[str] = field(default_factory=list)
    verbatim: list[tuple[str, str]] = field(default_factory=list)
    reworded: list[tuple[str, str]] = field(default_factory=list)
    partial: list[tuple[str, str]] = field(default_factory=list)

    def planted(self) -> set[str]:
        """The ids of all documents that were changed or made up."""
        pairs = [*self.exact, *self.personal, *self.verbatim, *self.reworded, *self.partial]
        return {copy for copy, *_ in self.near} | {key for key, _ in pairs} | {*self.boilerplate, *self.profane}


def near_copy(text: str, similarity: float, rng: random.Random) -> str:
    """Return a text with as many single words replaced as make about this Jaccard similarity of 5-grams."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word.isalpha()]
    num_shingles = len(words_of(text)) - 4
    changes = max(1, round(num_shingles * (1 - similarity) / (5 * (1 + similarity))))
    step = len(places) / changes
    others = [word for word in words if word.isalpha()]
    for change in range(changes):
        place = places[int(change * step + rng.random() * max(1, step - 5))]
        words[place] = rng.choice(others) + rng.choice(["ly", "ness", "ish", "ward"])
    return " ".join(words)


def make_heap(
    bases: Sequence[tuple[str, str]], suite: Sequence[str], *, seed: int = 0, each: int = 10, plain: int | None = None
) -> Heap:
    """Return a heap of base texts with `each` documents of every planted kind; `plain` bases stay as they are."""
    rng = random.Random(seed)
    heap = Heap(suite=list(suite))
    pool = list(bases)
    rng.shuffle(pool)
    chosen = iter(pool)
    for name, text in (next(chosen) for _ in range(plain if plain is not None else len(pool) // 2)):
        heap.texts[name] = text
    originals = list(heap.texts)
    for number in range(each):
        for similarity in (0.85, 0.5):
            original = rng.choice(originals)
            key = f"near-{similarity}-{number}"
            heap.texts[key] = near_copy(heap.texts[original], similarity, rng)
            heap.near.append((key, original, similarity))
        original = rng.choice(originals)
        heap.texts[f"exact-{number}"] = heap.texts[original] + "\n" * rng.randint(0, 2)
        heap.exact.append((f"exact-{number}", original))
        menu = ["Home", "About us", "Contact", "Privacy policy", "Terms of use", f"Item {number}", "Read more"]
        heap.texts[f"boilerplate-{number}"] = "\n".join(rng.choice(menu) for _ in range(80))
        heap.boilerplate.append(f"boilerplate-{number}")
        heap.texts[f"profane-{number}"] = _with(rng, next(chosen)[1], f"{SEVERE.title()}!")
        heap.profane.append(f"profane-{number}")
        datum = PERSONAL[number % len(PERSONAL)].format(n=100 + number)
        heap.texts[f"personal-{number}"] = _with(rng, next(chosen)[1], datum)
        heap.personal.append((f"personal-{number}", datum))
    for kind, found in (("verbatim", heap.verbatim), ("reworded", heap.reworded), ("partial", heap.partial)):
        for number in range(each if suite else 0):
            item = suite[number % len(suite)]
            words = item.split(" ")
            if kind == "reworded":
                words[len(words) // 2] = "otherwise"
            elif kind == "partial":
                words = words[: -(-len(words) * 6 // 10)]
            heap.texts[f"{kind}-{number}"] = _with(rng, next(chosen)[1], " ".join(words))
            found.append((f"{kind}-{number}", item))
    return heap


def _with(rng: random.Random, text: str, part: str) -> str:
    """Return a text with a part between two of its words."""
    words = text.split(" ")
    place = rng.randint(1, len(words) - 1)
    return " ".join([*words[:place], part, *words[place:]])


def write_heap(heap: Heap, folder: Path, *, num_files: int = 8, seed: int = 0) -> None:
    """Write a heap as files of several formats, with word list and suite beside them."""
    rows = [{"id": key, "text": text, "url": f"https://site.example/{key}"} for key, text in heap.texts.items()]
    random.Random(seed).shuffle(rows)
    for number in range(num_files):
        part = rows[number::num_files]
        place = folder / "raw" / ("web" if number % 2 else "books")
        place.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        if number % 4 == 0:
            (place / f"{number}.jsonl").write_bytes(lines)
        elif number % 4 == 1:
            (place / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        elif number % 4 == 2:
            import zstandard

            (place / f"{number}.jsonl.zst").write_bytes(zstandard.compress(lines))
        else:
            pq.write_table(pa.Table.from_pylist(part), place / f"{number}.parquet")
    (folder / "severe.txt").write_text(f"# words\n{SEVERE}\n")
    (folder / "suite.jsonl").write_text("".join(json.dumps({"prompt": item}) + "\n" for item in heap.suite))
