"""A corpus: documents split once into train and held-out windows, kept in a ledger that every part reads.

A folder or URL holds `corpus.json`, with counts, origin, fingerprints, the tokenizers that the windows were planned for
and the index of the shards, and the shards, `windows/SPLIT/NUMBER.parquet`: a row per window, in the order of the
documents. The windows of a document follow each other and together are the document, byte for byte, but for white space
that would fill windows of its own (and the last document under a cap may end early).

Opening reads `corpus.json` alone. Of the shards a bounded number of row groups is held in memory; the index takes some
700 bytes per shard. Version 2, a single file `windows.parquet` that is held in memory, is read as well.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from services.base.credentials import without_credentials
from services.base.files import join_location, open_location
from services.corpus.shards import Shard, ShardReader
from services.models.packages import file_sha256
from services.wire.passage import Passage

TRAIN, HELD_OUT = "train", "held_out"
RECORD, WINDOWS, SINGLE_FILE = "corpus.json", "windows", "windows.parquet"
VERSION, SINGLE_FILE_VERSION = 3, 2


@dataclass(frozen=True, slots=True)
class Window:
    """A window: its bytes, its document, the place in it, and the index in the split.

    `context` is the text right before it that sources read with it; `ends_document` is True where the document ends
    with it; `domain` is that of the document, empty where the corpus has no `domain_field` or the record no domain.
    """

    text: bytes
    document: str
    start_byte: int
    index: int
    context: bytes
    ends_document: bool
    messages: bytes = b""
    turn: int = 0
    domain: str = ""

    @property
    def passage(self) -> Passage:
        """The text with its context, as sources score it and as its scores are stored."""
        return Passage(self.text, self.context, self.ends_document, self.messages)


class _Rows(Protocol):
    """The windows of a split as rows of Arrow tables."""

    def at(self, index: int) -> tuple[pa.Table | pa.RecordBatch, int]:
        """Return rows that hold the window at an index, and its place among them."""

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table | pa.RecordBatch]:
        """Yield the named columns of all rows in order; one that the ledger does not have is left out."""

    def check_sizes(self) -> None:
        """Raise ValueError naming a file that is missing or has another size than the ledger says."""


class _TableRows:
    """A split in memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def at(self, index: int) -> tuple[pa.Table, int]:
        return self._table, index

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        yield self._table.select([name for name in columns if name in self._table.schema.names])

    def check_sizes(self) -> None:
        return  # the whole file was read


class _ShardRows:
    """A split in shards."""

    def __init__(self, reader: ShardReader, shards: list[Shard], windows_per_group: int) -> None:
        self._reader, self._shards, self._windows_per_group = reader, shards, windows_per_group
        self._starts = list(accumulate((shard.num_windows for shard in shards), initial=0))

    def at(self, index: int) -> tuple[pa.RecordBatch, int]:
        number = bisect_right(self._starts, index) - 1
        group, row = divmod(index - self._starts[number], self._windows_per_group)
        return self._reader.group(self._shards[number], group), row

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for shard in self._shards:
            yield from self._reader.groups(shard, columns)

    def check_sizes(self) -> None:
        self._reader.check_sizes(self._shards)


class Corpus:
    """The ledger of a prepared corpus. May be used from several threads.

    Reading a window raises `shards.DamagedShardError`, naming the shard that is missing or another one than
    `corpus.json` describes, or `shards.UnreadableShardError`; both are ValueErrors.
    """

    def __init__(self, folder: str, record: dict[str, Any], splits: Mapping[str, _Rows]) -> None:
        self.folder, self.record = folder, record
        self._splits = dict(splits)

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Open what `prepare.plan_corpus` wrote to a folder or URL; ValueError when it is missing or damaged."""
        location = str(folder)
        place = without_credentials(join_location(location, RECORD))
        files, root = open_location(location, "corpus")
        try:
            with files.open_input_stream(f"{root}/{RECORD}") as stream:
                record = json.loads(stream.read())
            if record["version"] == SINGLE_FILE_VERSION:
                return cls(location, record, _single_file(Path(root), record))
            if record["version"] != VERSION:
                raise ValueError(f"version {record['version']} is not one that this version reads")
            return cls(location, record, _sharded(location, record))
        except FileNotFoundError as error:
            missing = place if error.filename is None else error.filename
            raise ValueError(f"corpus: {missing} does not exist; prepare the corpus first") from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"corpus: {place} cannot be read: {without_credentials(str(error))}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"corpus: {place} is damaged: {error}; prepare it again") from error

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def num_windows(self, split: str) -> int:
        return int(self._info(split)["num_windows"])

    def num_bytes(self, split: str) -> int:
        return int(self._info(split)["num_bytes"])

    def windows_per_group(self, split: str) -> int:
        """Return the number of neighbours in a split that are read together; 0 where all of it is in memory."""
        return int(self._info(split).get("windows_per_group", 0))

    def fingerprint(self, split: str) -> str:
        """Return the hash over the windows of the split: equal for the same text in the same windows."""
        return str(self._info(split)["fingerprint"])

    def window(self, split: str, index: int) -> Window:
        """Return the window at `index`, from 0 to `num_windows(split) - 1`; IndexError outside of it."""
        if not 0 <= index < self.num_windows(split):
            raise IndexError(f"window {index} of {self.num_windows(split)} in split {split!r}")
        rows = self._splits[split]
        batch, place = rows.at(index)
        columns = ["text", "document", "start_byte", "ends_document"]
        columns += [name for name in ("domain", "messages", "turn") if name in batch.schema.names]
        row = {name: batch.column(name)[place].as_py() for name in columns}
        num_before, at, context = row["start_byte"] - batch.column("context_start")[place].as_py(), index, b""
        while len(context) < num_before:
            at -= 1  # the windows before it are of the same document
            batch, place = rows.at(at)
            context = batch.column("text")[place].as_py() + context
        return Window(**row, index=index, context=context[len(context) - num_before :])

    def texts(self, split: str) -> Iterator[bytes]:
        """Yield the windows' bytes in order."""
        self._info(split)
        for batch in self._splits[split].batches(["text"]):
            yield from batch.column("text").to_pylist()

    def domains(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield document and domain of every window in order; "" for a document without one."""
        self._info(split)
        for batch in self._splits[split].batches(["document", "domain"]):
            documents = batch.column("document").to_pylist()
            named = "domain" in batch.schema.names
            domains = batch.column("domain").to_pylist() if named else [""] * len(documents)
            yield from zip(documents, (domain or "" for domain in domains), strict=True)

    def check_sizes(self) -> None:
        """Raise ValueError naming a file that is missing or has another size than the ledger says."""
        for rows in self._splits.values():
            rows.check_sizes()

    def _info(self, split: str) -> dict[str, Any]:
        if split not in self._splits:
            raise ValueError(f"split: corpus {self.name!r} has no {split!r}, only {', '.join(self._splits)}")
        info: dict[str, Any] = self.record["splits"][split]
        return info


def shards_of(record: dict[str, Any], split: str) -> list[Shard]:
    """Return the index of a split's shards; none in a ledger of version 2."""
    return [Shard(**shard) for shard in record["splits"][split].get("shards", ())]


def _sharded(location: str, record: dict[str, Any]) -> dict[str, _Rows]:
    reader = ShardReader(join_location(location, WINDOWS))
    return {
        split: _ShardRows(reader, shards_of(record, split), info["windows_per_group"])
        for split, info in record["splits"].items()
    }


def _single_file(folder: Path, record: dict[str, Any]) -> dict[str, _Rows]:
    if record["windows_sha256"] != file_sha256(folder / SINGLE_FILE):
        raise ValueError(f"{folder / SINGLE_FILE} is not the file that it describes")
    table = pq.read_table(folder / SINGLE_FILE)
    return {
        split: _TableRows(table.slice(info["first_row"], info["num_windows"]))
        for split, info in record["splits"].items()
    }
