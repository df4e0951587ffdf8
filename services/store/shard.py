"""A shard: a Parquet file of scored windows, and a record beside it with the file's hash, size and keys.

The same rows in the same order give the same bytes with the same version of pyarrow: nothing in a shard depends on
the time of writing or the writer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.base.files import Files
from services.store.rows import SCHEMA, SPLIT_COLUMNS, concatenated, decode_row, row_keys

_ROW_GROUP_TOKENS = 2048
"""Tokens of a row group, which is read as a whole: some 300 kB at 64 candidates, one request to an object store."""
_ZSTD_LEVEL = 3

UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""The errors that reading a damaged shard raises."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The file beside a shard. `keys` are those of the shard's rows, in order."""

    sha256: str
    num_bytes: int
    keys: tuple[bytes, ...]

    def to_json(self) -> bytes:
        values = {"sha256": self.sha256, "num_bytes": self.num_bytes, "keys": [key.hex() for key in self.keys]}
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> ShardRecord:
        """Return the record in a file's bytes; raises ValueError when they are damaged."""
        try:
            values = json.loads(data)
            return cls(values["sha256"], values["num_bytes"], tuple(map(bytes.fromhex, values["keys"])))
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"damaged record: {error}") from error


def write_shard(files: Files, path: str, rows: Sequence[pa.RecordBatch]) -> ShardRecord:
    """Write `path`.parquet and then `path`.json: a shard whose record is there is complete."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        SCHEMA,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=False,
        column_encoding={_physical(name): "BYTE_STREAM_SPLIT" for name in SPLIT_COLUMNS},
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for group in _groups(rows):
            writer.write_table(concatenated(group))
    data = sink.getvalue().to_pybytes()
    keys = tuple(key for row in rows for key in row_keys(row))
    record = ShardRecord(hashlib.sha256(data).hexdigest(), len(data), keys)
    files.write(f"{path}.parquet", data)
    files.write(f"{path}.json", record.to_json())
    return record


def read_record(files: Files, path: str) -> ShardRecord | None:
    """Return the record of a shard; None when there is none, ValueError when it is damaged."""
    data = files.read(f"{path}.json")
    return ShardRecord.from_json(data) if data is not None else None


def check_shard(files: Files, path: str, keys: Sequence[bytes] | None = None, vocabulary: str | None = None) -> None:
    """Read a shard and its record in full; raise ValueError naming their problem.

    Args:
        keys: those that the shard must hold, where they are known.
        vocabulary: of its blocks; when it is given, every row is decoded, not only the hash compared.
    """
    record, data = read_record(files, path), files.read(f"{path}.parquet")
    if data is None:
        raise ValueError("missing")
    if record is None:
        raise ValueError("its record is missing")
    if len(data) != record.num_bytes:
        raise ValueError(f"truncated: {len(data)} bytes of {record.num_bytes}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ValueError("corrupt: its hash is not the recorded one")
    if keys is not None and tuple(keys) != record.keys:
        raise ValueError("holds other windows than those of the corpus")
    if vocabulary is not None:
        _check_rows(data, record, vocabulary)


def _check_rows(data: bytes, record: ShardRecord, vocabulary: str) -> None:
    try:
        table = pq.read_table(pa.BufferReader(data), schema=SCHEMA).combine_chunks()
        for row in range(table.num_rows):
            decode_row(table, row, vocabulary)
    except UNREADABLE as error:
        raise ValueError(f"cannot be read: {error}") from error
    if tuple(row_keys(table)) != record.keys:
        raise ValueError("holds other windows than its record says")


class OpenShard:
    """A shard for random access, from several threads. Raises one of `UNREADABLE` when it cannot be read."""

    def __init__(self, files: Files, path: str) -> None:
        self._file = pq.ParquetFile(files.open(f"{path}.parquet"), page_checksum_verification=True)
        if not self._file.schema_arrow.equals(SCHEMA, check_metadata=True):
            raise ValueError("columns: written in another format than this version reads")
        metadata = self._file.metadata
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
        self._lock = threading.Lock()
        self._last: tuple[int, pa.Table] | None = None

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> pa.RecordBatch:
        """Return a batch of one row; IndexError beyond the end."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        with self._lock:  # pyarrow's reader is for one thread at a time
            if self._last is None or self._last[0] != group:  # windows read in order share their groups
                self._last = group, self._file.read_row_group(group).combine_chunks()
            table = self._last[1]
        start = int(self._ends[group - 1]) if group else 0
        batch: pa.RecordBatch = table.slice(index - start, 1).to_batches()[0]
        return batch


def _groups(rows: Sequence[pa.RecordBatch]) -> list[list[pa.RecordBatch]]:
    groups: list[list[pa.RecordBatch]] = []
    num_tokens = _ROW_GROUP_TOKENS
    for row in rows:
        if num_tokens >= _ROW_GROUP_TOKENS:
            groups.append([])
            num_tokens = 0
        groups[-1].append(row)
        num_tokens += len(row.column("gold").flatten())
    return groups


def _physical(name: str) -> str:
    return f"{name}.list.element" if pa.types.is_list(SCHEMA.field(name).type) else name
