"""The documents of a corpus on disk while it is prepared: written in runs as they are read, read in drawn order.

The draw orders documents by a hash of seed and text, so that it depends neither on file names nor on other documents.
A run holds some documents in that order, divided into buckets by their hashes: bucket b of all runs together is the
b-th part of all documents in the draw's order. Memory is that of one run, or of one bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusion_core.arrays import Bool, Int64
from services.corpus.config import CorpusConfig
from services.corpus.document import Conversation, Document
from services.corpus.readers import documents
from services.wire.messages import read_messages

_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("name", pa.string()),
        ("text", pa.large_binary()),
        ("domain", pa.string()),
        ("messages", pa.large_binary()),
    ]
)
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of a corpus.

    Attributes:
        folder: where they lie.
        config: how files are read, and the seed.
        root: folder that the names of documents start from.
        num_buckets: number of parts of the draw's order.
        run_bytes: approximate bytes of text in a run.
    """

    folder: Path
    config: CorpusConfig
    root: Path
    num_buckets: int
    run_bytes: int

    def write(self, task: int, files: Sequence[Path]) -> tuple[int, int]:
        """Write the documents of some files; return the number of documents with text, and of those with a domain.

        The runs of a lower `task` hold documents that come earlier. Raises what `documents` raises.
        """
        config = self.config
        read = documents(
            files,
            self.root,
            format_=config.format,
            separator=config.separator,
            text_field=config.text_field,
            domain_field=config.domain_field,
        )
        run, num_bytes, number, counts = list[Document](), 0, 0, np.zeros(2, np.int64)
        for document in read:
            if not document.text.strip():
                continue
            run.append(document)
            num_bytes += len(document.text)
            counts += (1, bool(document.domain))
            if num_bytes >= self.run_bytes:
                self._write_run(f"{task:06}-{number:06}.arrow", run)
                run, num_bytes, number = [], 0, number + 1
        if run:
            self._write_run(f"{task:06}-{number:06}.arrow", run)
        return int(counts[0]), int(counts[1])

    def bucket(self, number: int) -> Bucket:
        """Return the documents of a bucket in the draw's order, of each text the one that was read first."""
        batches = [
            pa.ipc.open_file(pa.memory_map(str(path))).get_batch(number) for path in sorted(self.folder.glob("*.arrow"))
        ]
        table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
        keys = _keys(table)
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = sorted_keys[1:] != sorted_keys[:-1]
        return Bucket(table.take(order[is_first]))

    def _write_run(self, name: str, run: Sequence[Document]) -> None:
        seed = f"{self.config.seed}\0".encode()
        keys = [hashlib.sha256(seed + document.text).digest() for document in run]
        order = sorted(range(len(run)), key=keys.__getitem__)
        ordered_keys = [keys[place] for place in order]
        columns: list[list[Any]] = [
            ordered_keys,
            [run[place].name for place in order],
            [run[place].text for place in order],
            [run[place].domain for place in order],
            [_messages(run[place]) for place in order],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
        batch = pa.record_batch(arrays, schema=_SCHEMA)
        buckets = [int.from_bytes(key[:8], "big") * self.num_buckets >> 64 for key in ordered_keys]
        ends = np.searchsorted(buckets, np.arange(self.num_buckets + 1))
        with pa.ipc.new_file(str(self.folder / name), _SCHEMA, options=_OPTIONS) as writer:
            for start, end in pairwise(ends):
                writer.write_batch(batch.slice(start, end - start))


class Bucket:
    """Some documents in the draw's order.

    Attributes:
        lengths_N: int64, bytes of each document.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        lengths = pc.binary_length(table.column("text"))
        self.lengths_N: Int64 = lengths.to_numpy().astype(np.int64)

    def starts(self) -> Int64:
        """Return the offset of each document, as if all were written behind each other."""
        return np.cumsum(self.lengths_N) - self.lengths_N

    def domains(self) -> list[str]:
        found: list[str] = self._table.column("domain").to_pylist()
        return found

    def texts(self, chosen_N: Bool) -> Iterator[bytes]:
        """Yield the texts of the chosen documents."""
        texts = self._table.column("text")
        return (texts[int(place)].as_py() for place in np.flatnonzero(chosen_N))

    def keys(self, chosen_N: Bool) -> bytes:
        """Return the hashes that order the chosen documents, 32 bytes each."""
        found: bytes = _keys(self._table)[chosen_N].tobytes()
        return found

    def documents(self, chosen_N: Bool) -> Iterator[Document]:
        """Yield the chosen documents."""
        names, texts, domains, messages = (self._table.column(n) for n in ("name", "text", "domain", "messages"))
        for place in map(int, np.flatnonzero(chosen_N)):
            name, text, domain = names[place].as_py(), texts[place].as_py(), domains[place].as_py()
            if messages[place].is_valid:
                yield Conversation(name, text, domain, read_messages(messages[place].as_py()))
            else:
                yield Document(name, text, domain)


def _keys(table: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.bytes_]]:
    keys = table.column("key").cast(pa.binary()).to_pylist()
    return np.array(keys, dtype="S32")


def _messages(document: Document) -> bytes | None:
    return document.conversation.to_bytes() if isinstance(document, Conversation) else None
