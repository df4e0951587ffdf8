"""Split documents into train and held-out ones, so that neither repeats runs of the other's text.

Shape legend: H hashes of runs of text.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fusion_core.arrays import UInt64
from services.base.errors import SettingError
from services.corpus.document import Document
from services.corpus.windows import WHITESPACE

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_BYTE_CODES = np.random.default_rng(0).integers(1, 2**63, 256, dtype=np.uint64)
_TABLE_SLOTS_PER_HASH = 8
_MOST_TABLE_BITS = 28
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitDocuments:
    """The documents of either split, in drawn order, and the numbers of those left out.

    `num_duplicates`: documents whose text came before; `num_dropped`: train documents sharing text with held-out ones.
    """

    train: list[Document]
    held_out: list[Document]
    num_documents: int
    num_duplicates: int
    num_dropped: int

    def train_texts(self, max_bytes: int | None) -> Iterator[str]:
        """Yield the train documents, the last one cut so that all have at most `max_bytes` together."""
        left = max_bytes if max_bytes is not None else sum(len(document.text) for document in self.train)
        for document in self.train:
            if left <= 0:
                return
            yield document.text[:left].decode("utf-8", errors="ignore")
            left -= len(document.text)


def split_documents(
    read: Iterable[Document], *, held_out_share: float, shared_run_bytes: int | None, seed: int
) -> SplitDocuments:
    """Draw the held-out documents; SettingError when a split would be empty.

    The draw orders documents by a hash of seed and text: it depends neither on file names nor on other documents.
    """
    written = [document for document in read if document.text.strip()]
    unique = list({document.text: document for document in reversed(written)}.values())[::-1]
    drawn = sorted(unique, key=lambda doc: hashlib.sha256(f"{seed}\0".encode() + doc.text).digest())
    wanted = held_out_share * sum(len(document.text) for document in drawn)
    ends = accumulate(len(document.text) for document in drawn)
    num_held_out = 1 + sum(end < wanted for end in ends)
    held_out, train = drawn[:num_held_out], drawn[num_held_out:]
    if unique and not train:
        raise SettingError(
            "held_out_share",
            f"nothing is left for training, the text has {len(unique)} document(s); "
            "documents are never cut in two: give more files, a smaller share, or a `separator`",
        )
    num_train = len(train)
    if shared_run_bytes is not None:
        texts, others = ([document.text for document in part] for part in (train, held_out))
        shared = sharing(texts, others, shared_run_bytes)
        train = [document for document, is_shared in zip(train, shared, strict=True) if not is_shared]
    dropped = num_train - len(train)
    if dropped:
        _log.warning("%d of %d train documents repeat text of held-out ones and are left out", dropped, num_train)
    if unique and not train:
        raise SettingError("shared_run_bytes", f"every train document shares {shared_run_bytes} bytes with held-out")
    return SplitDocuments(train, held_out, len(unique), len(written) - len(unique), dropped)


def run_hashes(text: bytes, run_bytes: int) -> UInt64:
    """Return hashes of all runs of `run_bytes` bytes that begin with a word; equal runs have equal hashes."""
    # Polynomial hashes modulo 2^64: a run's hash is a difference of prefix sums, shifted back to its start.
    if len(text) < run_bytes:
        return np.zeros(0, dtype=np.uint64)
    array = np.frombuffer(text, dtype=np.uint8)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(text), _MULTIPLIER, dtype=np.uint64), dtype=np.uint64)
        sums = np.concatenate(([np.uint64(0)], np.cumsum(_BYTE_CODES[array] * powers, dtype=np.uint64)))
        inverses = np.cumprod(np.full(len(text), _INVERSE, dtype=np.uint64), dtype=np.uint64)
        hashes = (sums[run_bytes:] - sums[:-run_bytes]) * inverses[: len(sums) - run_bytes]
    space = WHITESPACE[array]
    begins = ~space & np.concatenate(([True], space[:-1]))
    result: UInt64 = hashes[begins[: len(hashes)]]
    return result


def sharing(texts: Iterable[bytes], others: Iterable[bytes], run_bytes: int) -> list[bool]:
    """Return for each text whether it has a run of `run_bytes` bytes, beginning with a word, in common with `others`.

    The time is linear in all text: a table over some bits of the hashes answers nearly every run, and only a run that
    the table knows is looked up among the sorted hashes.
    """
    known_H = np.unique(np.concatenate([np.zeros(0, np.uint64), *(run_hashes(other, run_bytes) for other in others)]))
    bits = min(_MOST_TABLE_BITS, max(1, (len(known_H) * _TABLE_SLOTS_PER_HASH).bit_length()))
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, dtype=np.bool_)
    table[known_H >> shift] = True
    found = []
    for text in texts:
        hashes_H = run_hashes(text, run_bytes)
        hashes_H = hashes_H[table[hashes_H >> shift]]
        places_H = np.minimum(np.searchsorted(known_H, hashes_H), max(len(known_H) - 1, 0))
        found.append(bool(hashes_H.size) and bool((known_H[places_H] == hashes_H).any()))
    return found
