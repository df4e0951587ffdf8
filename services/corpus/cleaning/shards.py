"""Documents between two steps: Parquet shards in a folder or an object store, read and written a batch at a time.

A step writes `STEP/TASK/kept.parquet` and `dropped.parquet`, the latter with a reason for every document.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.base.files import Files

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


@dataclass(frozen=True, slots=True)
class StepFiles:
    """What a step has written below the folder or URL of all steps."""

    files: Files
    step: str

    def folder(self, task: int) -> str:
        """Return the path of a task's folder."""
        return f"{self.step}/{task:05d}"

    def open(self, task: int, name: str) -> Any:
        """Open a file for random access."""
        return self.files.open(f"{self.folder(task)}/{name}")

    def documents(self, task: int) -> Iterator[list[RawDocument]]:
        """Yield the documents that a task kept, a row group at a time."""
        with self.open(task, KEPT) as stream, pq.ParquetFile(stream) as file:
            for group in range(file.num_row_groups):
                columns = file.read_row_group(group, columns=_NAMES)
                yield [RawDocument(**row) for row in columns.to_pylist()]

    def num_documents(self, task: int) -> int:
        """Return the number of documents that a task kept."""
        with self.open(task, KEPT) as stream:
            return int(pq.read_metadata(stream).num_rows)

    def load(self, task: int, name: str) -> Any:
        """Return what numpy saved in a file."""
        with self.open(task, name) as stream:
            return np.load(io.BytesIO(stream.read()))

    def mapped(self, task: int, name: str) -> np.ndarray:
        """Return a saved array that is read from a local disk as it is used."""
        if (folder := self.files.local_folder) is not None:
            return _mapped(folder / self.folder(task) / name)
        with tempfile.NamedTemporaryFile(prefix="fusion-", suffix=".npy") as copy:
            with self.open(task, name) as stream:
                shutil.copyfileobj(stream, copy)
            copy.flush()
            return _mapped(Path(copy.name))  # what is mapped stays until it is no longer used


def _mapped(path: Path) -> np.ndarray:
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="r")
    except ValueError:  # an empty one cannot be mapped
        mapped = np.load(path)
    return mapped


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
