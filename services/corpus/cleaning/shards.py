"""Documents between two steps: Parquet shards, read and written a batch at a time.

A step writes `STEP/TASK/kept.parquet` and `dropped.parquet`, the latter with a reason for every document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

KEPT, DROPPED = "kept.parquet", "dropped.parquet"
_FLUSH_BYTES = 1 << 22
"""Bytes of text in a row group, about; what a task holds at once is a small multiple of it."""
_FLUSH_ROWS = 2048


@dataclass(slots=True)
class RawDocument:
    """A document on its way through the steps, which may change its text.

    Attributes:
        id: its own, or file and row that it was read from.
        kind: `text` or `code`.
        domain: the part of the corpus that it belongs to; its folder or file where it names none.
        language: ISO 639-1 code of a text, name of a programming language; empty where it is not known.
        repository, path: place of a file of code; empty elsewhere.
    """

    id: str
    text: str
    url: str = ""
    domain: str = ""
    language: str = ""
    kind: str = "text"
    repository: str = ""
    path: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


class Drop(NamedTuple):
    """The reason for which a document is dropped, a name that reports count by, and the particulars."""

    reason: str
    detail: str = ""


_NAMES = [field.name for field in fields(RawDocument)]
SCHEMA = pa.schema([(name, pa.string()) for name in _NAMES])
_DROPPED_SCHEMA = SCHEMA.append(pa.field("reason", pa.string())).append(pa.field("detail", pa.string()))


def shard_folder(step: Path, task: int) -> Path:
    """Return the folder of a task of a step."""
    return step / f"{task:05d}"


class ShardWriter:
    """A shard that is being written; a context manager."""

    def __init__(self, path: Path, *, with_reasons: bool = False) -> None:
        self._schema = _DROPPED_SCHEMA if with_reasons else SCHEMA
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, str]] = []
        self._size = 0

    def write(self, document: RawDocument, drop: Drop | None = None) -> None:
        row = {name: getattr(document, name) for name in _NAMES}
        self._rows.append(row if drop is None else row | drop._asdict())
        self._size += len(document.text)
        if self._size >= _FLUSH_BYTES or len(self._rows) >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._size = [], 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def read_shard(path: Path) -> Iterator[list[RawDocument]]:
    """Yield the documents of a shard, a row group at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            columns = file.read_row_group(group, columns=_NAMES)
            yield [RawDocument(**row) for row in columns.to_pylist()]


def num_documents(path: Path) -> int:
    """Return the number of documents in a shard."""
    return int(pq.read_metadata(path).num_rows)
