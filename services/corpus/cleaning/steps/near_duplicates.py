"""Near copies by MinHash with locality-sensitive hashing (Broder 1997; Lee et al. 2022).

datatrove computes the signatures. Its search joins whatever shares a bucket, and whatever that shares one with; here a
document goes only when its signature agrees with that of a document that stays. `b` bands of `r` hashes bring together
two documents of similarity s with probability 1 - (1 - s^r)^b, which is at least 0.95 at the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.corpus.cleaning.config import NearDuplicatesConfig
from services.corpus.cleaning.shards import StepFiles
from services.corpus.cleaning.steps.duplicates import write_removed

SIGNATURES, BANDS = "signatures.npy", "bands.npy"
_HASHES, _FOUND_AT_THRESHOLD = 144, 0.95
_PAIRS_AT_ONCE = 1 << 15


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Return how many bands of how many hashes find two documents at the threshold with probability 0.95."""
    fitting = [r for r in range(1, 25) if 1 - (1 - threshold**r) ** (_HASHES // r) >= _FOUND_AT_THRESHOLD]
    return _HASHES // fitting[-1], fitting[-1]


def write_signatures(source: StepFiles, config: NearDuplicatesConfig, task: int, folder: Path) -> None:
    """Write signatures_NH (uint32) and bands_BN (uint64, 0 where a document is shorter than an n-gram) of a shard."""
    bands, rows = bands_and_rows(config.threshold)
    num = source.num_documents(task)
    signatures_NH = np.zeros((num, bands * rows), np.uint32)
    bands_BN = np.zeros((bands, num), np.uint64)
    weights = np.random.default_rng(0).integers(1, 2**63, size=rows, dtype=np.uint64) | np.uint64(1)
    signer, place = _signer(config, bands, rows, folder), 0
    for batch in source.documents(task):
        for document in batch:
            shingles = signer.get_shingles(document.text)
            if shingles.size:
                signature = np.array(signer.get_signature(np.unique(shingles).reshape(-1, 1)), dtype=np.uint64)
                signatures_NH[place] = signature.reshape(-1).astype(np.uint32)
                bands_BN[:, place] = _mixed((signature * weights).sum(axis=1)) | np.uint64(1)
            place += 1
    np.save(folder / SIGNATURES, signatures_NH)
    np.save(folder / BANDS, bands_BN)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return values whose every bit depends on all bits of the sum (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _signer(config: NearDuplicatesConfig, bands: int, rows: int, folder: Path) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.text import TextNormConfig

    from services.corpus.cleaning.steps.words import Words

    settings = MinhashConfig(
        n_grams=config.ngram,
        num_buckets=bands,
        hashes_per_bucket=rows,
        norm_config=TextNormConfig(norm_unicode_diacritics=False),
    )
    return MinhashDedupSignature(str(folder), settings, language=Words())


def find_near_copies(signed: StepFiles, num_shards: int, threshold: float, task: int, folder: Path) -> None:
    """Write, by shard, the places of documents that are near copies of an earlier one that stays.

    Memory: for each document of the corpus some 40 bytes and 24 for each of its candidates; signatures stay on disk.
    """
    signatures = _Signatures(signed, num_shards)
    num = sum(signatures.sizes)
    original_N, score_N = np.arange(num), np.ones(num)
    later_P, earlier_P = signatures.candidates()
    score_P = signatures.agreement(later_P, earlier_P)
    near_P = score_P >= threshold
    for later, earlier, first_score in zip(
        later_P[near_P].tolist(), earlier_P[near_P].tolist(), score_P[near_P].tolist(), strict=True
    ):
        if original_N[later] != later:
            continue  # gone already
        stays, score = int(original_N[earlier]), first_score
        if stays != earlier:
            [score] = signatures.agreement(np.array([later]), np.array([stays])).tolist()
        if score >= threshold:
            original_N[later], score_N[later] = stays, score
    write_removed(folder, signatures.sizes, original_N, score_N)


@dataclass(init=False)
class _Signatures:
    """The signatures of all shards, read from disk as they are asked for; a document is known by its number."""

    def __init__(self, signed: StepFiles, num_shards: int) -> None:
        self._signed, self._num_shards = signed, num_shards
        self._parts = [signed.mapped(shard, SIGNATURES) for shard in range(num_shards)]
        self.sizes = [len(part) for part in self._parts]
        self._ends = np.cumsum(self.sizes)

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs (later, earlier) that share a band, each once, ordered by the later one.

        In a group that shares a band, each document is paired with the first one and with the one before it.
        """
        pairs = [np.zeros((0, 2), np.int64)]
        maps = [self._signed.mapped(shard, BANDS) for shard in range(self._num_shards)]
        for band in range(len(maps[0])):
            pairs.append(np.concatenate(list(_pairs(np.concatenate([part[band] for part in maps])))))
            if sum(map(len, pairs)) > 1 << 24:
                pairs = [np.unique(np.concatenate(pairs), axis=0)]
        every = np.unique(np.concatenate(pairs), axis=0)
        return every[:, 0], every[:, 1]

    def agreement(self, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
        """Return the share of equal hashes of each pair: an estimate of the Jaccard similarity."""
        score_P = np.empty(len(left_P))
        for start in range(0, len(left_P), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            score_P[part] = (self._rows(left_P[part]) == self._rows(right_P[part])).mean(axis=1)
        return score_P

    def _rows(self, numbers_P: np.ndarray) -> np.ndarray:
        shard_P = np.searchsorted(self._ends, numbers_P, side="right")
        rows_PH = np.empty((len(numbers_P), self._parts[0].shape[1]), np.uint32)
        for shard in np.unique(shard_P):
            here = shard_P == shard
            rows_PH[here] = self._parts[shard][numbers_P[here] - (self._ends[shard] - self.sizes[shard])]
        return rows_PH


def _pairs(band_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pairs of one band, (later, earlier)."""
    order = np.argsort(band_N, kind="stable")
    values = band_N[order]
    start = int(np.searchsorted(values, 1))  # 0 is no signature
    order, values = order[start:], values[start:]
    if not len(values):
        yield np.zeros((0, 2), np.int64)
        return
    new = np.concatenate([[True], values[1:] != values[:-1]])
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))]
    again = ~new
    yield np.stack([order[again], first[again]], axis=1)
    yield np.stack([order[again], order[np.flatnonzero(again) - 1]], axis=1)
