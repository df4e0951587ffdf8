"""Exact copies: the hash of every document, the first place of each hash, and the removal of all others.

The search holds 16 bytes per document of the corpus in memory, several times over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.corpus.cleaning.filtering import Judge
from services.corpus.cleaning.shards import Drop, RawDocument, StepFiles
from services.corpus.cleaning.tally import Tally

HASHES, REMOVED = "hashes.npy", "removed.npz"


def write_hashes(source: StepFiles, task: int, folder: Path) -> None:
    """Write 128-bit hashes of a shard's texts, without white space around them."""
    import xxhash

    digests = b"".join(
        xxhash.xxh3_128_digest(document.text.strip().encode()) for batch in source.documents(task) for document in batch
    )
    np.save(folder / HASHES, np.frombuffer(digests, dtype="S16"))


def find_copies(hashes: StepFiles, num_shards: int, task: int, folder: Path) -> None:
    """Write, by shard, the places of documents whose text an earlier document has."""
    parts = [hashes.load(shard, HASHES) for shard in range(num_shards)]
    every = np.concatenate(parts).view(np.dtype([("high", "<u8"), ("low", "<u8")]))
    order = np.lexsort((np.arange(len(every)), every["low"], every["high"]))
    same = every[order][1:] == every[order][:-1]
    starts = np.concatenate([[True], ~same]) if len(every) else np.zeros(0, bool)
    first_of = order[np.maximum.accumulate(np.where(starts, np.arange(len(every)), 0))] if len(every) else order
    original = np.empty(len(every), np.int64)
    original[order] = first_of
    write_removed(folder, [len(part) for part in parts], original)


def write_removed(folder: Path, sizes: list[int], original_N: np.ndarray, score_N: np.ndarray | None = None) -> None:
    """Write, by shard, which documents go, and for which document (number in the corpus) and score."""
    columns: dict[str, Any] = {}
    start = 0
    for shard, size in enumerate(sizes):
        place = np.arange(start, start + size)
        gone = np.flatnonzero(original_N[start : start + size] != place)
        columns[f"places_{shard}"] = gone
        columns[f"originals_{shard}"] = original_N[start + gone]
        columns[f"scores_{shard}"] = np.ones(len(gone)) if score_N is None else score_N[start + gone]
        start += size
    columns["sizes"] = np.array(sizes, dtype=np.int64)
    np.savez(folder / REMOVED, **columns)


@dataclass(frozen=True, slots=True)
class RemoveCopies:
    """Drops the documents that a search found."""

    found: StepFiles
    reason: str

    def open(self, task: int) -> Judge:
        with self.found.load(0, REMOVED) as removed:
            rows = zip(*(removed[f"{name}_{task}"].tolist() for name in ("places", "originals", "scores")), strict=True)
            gone = {place: (original, score) for place, original, score in rows}
            ends = np.cumsum(removed["sizes"])
            starts = (ends - removed["sizes"]).tolist()
        place = 0

        def judge(documents: list[RawDocument], tally: Tally) -> list[Drop | None]:
            nonlocal place
            drops: list[Drop | None] = []
            for _ in documents:
                drop = None
                if place in gone:
                    original, score = gone[place]
                    shard = int(np.searchsorted(ends, original, side="right"))
                    alike = "" if self.reason == "exact_copy" else f", {score:.2f} alike"
                    drop = Drop(self.reason, f"of document {original - starts[shard]} in shard {shard}{alike}")
                drops.append(drop)
                place += 1
            return drops

        return judge
