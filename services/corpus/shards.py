"""Shards: the Parquet files that hold a split's windows, written whole, and read a row group at a time.

The same windows in the same order give the same bytes with the same version of pyarrow.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from services.base.credentials import without_credentials
from services.base.errors import FailedPreconditionError, UnavailableError
from services.base.files import join_location, open_location

SCHEMA = pa.schema(
    [
        ("text", pa.binary()),
        ("document", pa.string()),
        ("start_byte", pa.int64()),
        ("context_start", pa.int64()),
        ("ends_document", pa.bool_()),
        ("domain", pa.string()),
        ("document_bytes", pa.int64()),
    ]
)
TURN_SCHEMA = SCHEMA.append(pa.field("messages", pa.binary())).append(pa.field("turn", pa.int64()))
"""Schema of a corpus of conversations: the messages before a turn, and its number in the conversation."""
READ_COLUMNS = ("text", "document", "start_byte", "context_start", "ends_document", "domain", "messages", "turn")
"""Columns that a `Window` is made of."""

GROUP_BYTES = 1 << 19
"""Approximate bytes of text in a row group, which is read as a whole."""
_OPEN_SHARDS = 48
"""Shards that are kept open, with footers of about 0.5 MiB each in memory."""
_CACHED_GROUPS = 64
"""Row groups that are kept decoded: those that a few streams at once draw from, see `permutation.GroupPermutation`."""
_FOOTER_END = 8
"""Bytes at the end of a Parquet file: the length of the footer and a mark."""


class DamagedShardError(FailedPreconditionError, ValueError):
    """A shard that is missing, or is not the file that the ledger describes."""


class UnreadableShardError(UnavailableError, ValueError):
    """A shard that cannot be read at the moment."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as the ledger's index describes it.

    Attributes:
        file: path below the folder of the windows.
        num_windows, num_bytes: number of its windows, and bytes of their text.
        file_bytes: size of the file.
        footer_sha256: hash of its Parquet footer.
        windows_sha256: hash over its windows, see `windows_digest`: of their contents, not of how they are stored.
    """

    file: str
    num_windows: int
    num_bytes: int
    file_bytes: int
    footer_sha256: str
    windows_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def group_rows(window_bytes: int) -> int:
    """Return the number of windows in a row group, for windows of at most so many bytes with all that is read."""
    return max(1, GROUP_BYTES // window_bytes)


def windows_digest(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> str:
    """Return a hash over windows: their text, and what is read before and behind it."""
    names = {name: place for place, name in enumerate(schema.names)}
    text, start, context_start, ends = (names[n] for n in ("text", "start_byte", "context_start", "ends_document"))
    messages = names.get("messages")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(row[text]).digest())
        digest.update(f"{row[start] - row[context_start]}:{int(row[ends])};".encode())
        if messages is not None:
            digest.update(hashlib.sha256(row[messages]).digest())
    return digest.hexdigest()


def split_fingerprint(shards: Sequence[Shard]) -> str:
    """Return the hash over the hashes of a split's shards."""
    return hashlib.sha256(b"".join(bytes.fromhex(shard.windows_sha256) for shard in shards)).hexdigest()


def encode_shard(
    file: str, rows: Sequence[Sequence[Any]], schema: pa.Schema, windows_per_group: int
) -> tuple[bytes, Shard]:
    """Return the bytes of a shard with these rows, and its entry in the index."""
    columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
    sink, digest = pa.BufferOutputStream(), windows_digest(rows, schema)
    # The footer carries the hash of the windows, so that no shard has the footer of another.
    table = pa.table(columns, schema=schema.with_metadata({"windows_sha256": digest}))
    pq.write_table(
        table,
        sink,
        row_group_size=windows_per_group,
        compression="lz4",  # a group is read for a single window: zstd takes twice as long to read, for 2/3 of the size
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    data = sink.getvalue().to_pybytes()
    num_bytes = sum(len(row[schema.names.index("text")]) for row in rows)
    return data, Shard(file, len(rows), num_bytes, len(data), _sha256(_footer(data)), digest)


def _footer(end: bytes) -> bytes:
    """Return the footer in the last bytes of a Parquet file; less where it is longer than these."""
    return end[-(int.from_bytes(end[-_FOOTER_END : 4 - _FOOTER_END], "little") + _FOOTER_END) :]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _OpenShard:
    def __init__(self, file: Any, metadata: Any) -> None:
        self.lock = threading.Lock()  # pyarrow's reader is for one thread at a time
        self.reader = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
        self.columns = [name for name in READ_COLUMNS if name in self.reader.schema_arrow.names]


class ShardReader:
    """Row groups of the shards in a folder or URL, for many threads; a bounded number of them is kept decoded.

    Size and footer of a shard are compared with the index when it is opened, and the checksum of every page when it is
    read, so that a changed byte is found where it is read, and nothing is read twice: a hash over whole shards would
    read gigabytes before the first window. The memory does not grow with the corpus.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files, self._root = open_location(folder, "corpus")
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()

    def group(self, shard: Shard, number: int) -> pa.RecordBatch:
        """Return a row group with the columns of `READ_COLUMNS`.

        Raises DamagedShardError, or UnreadableShardError, naming the shard.
        """
        key = shard.file, number
        if (batch := self._cached(key)) is not None:
            return batch
        opened = self._opened(shard)
        with opened.lock:
            if (batch := self._cached(key)) is not None:  # another thread has just read it
                return batch
            batch = self._read(shard, opened, number, READ_COLUMNS)
            with self._lock:
                self._groups[key] = batch
                while len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
        return batch

    def groups(self, shard: Shard, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a shard's row groups in order, without keeping them; raises as `group` does."""
        for number in range(self._opened(shard).reader.num_row_groups):
            opened = self._opened(shard)
            with opened.lock:
                batch = self._read(shard, opened, number, columns)
            yield batch

    def check_sizes(self, shards: Sequence[Shard]) -> None:
        """Raise DamagedShardError naming the first shard that is missing or has another size than the index says."""
        root = self._root.strip("/")
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        sizes = {i.path[i.path.index(root) + len(root) + 1 :]: i.size for i in self._files.get_file_info(selector)}
        for shard in shards:
            if shard.file not in sizes:
                raise DamagedShardError(f"corpus: {self.location(shard)} is missing")
            if sizes[shard.file] != shard.file_bytes:
                raise DamagedShardError(f"corpus: {self.location(shard)} is not the file that corpus.json describes")

    def location(self, shard: Shard) -> str:
        """Return the full path or URL of a shard, for messages."""
        return without_credentials(join_location(self._folder, shard.file))

    def _cached(self, key: tuple[str, int]) -> pa.RecordBatch | None:
        with self._lock:
            if (batch := self._groups.get(key)) is not None:
                self._groups.move_to_end(key)
            return batch

    def _read(self, shard: Shard, opened: _OpenShard, number: int, columns: Sequence[str]) -> pa.RecordBatch:
        there = [name for name in columns if name in opened.columns]
        try:
            table = opened.reader.read_row_group(number, columns=there, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            with self._lock:
                self._open.pop(shard.file, None)
            self._load(shard)  # raises where the file is missing, another one, or out of reach
            raise DamagedShardError(f"corpus: {self.location(shard)} is damaged: {error}; prepare it again") from error
        [batch] = table.combine_chunks().to_batches()
        return batch

    def _opened(self, shard: Shard) -> _OpenShard:
        with self._lock:
            if (opened := self._open.get(shard.file)) is not None:
                self._open.move_to_end(shard.file)
                return opened
        opened = self._load(shard)
        with self._lock:
            self._open[shard.file] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def _load(self, shard: Shard) -> _OpenShard:
        try:
            file = self._files.open_input_file(f"{self._root}/{shard.file}")
            size = file.size()
            end = file.read_at(min(size, 1 << 16), max(0, size - (1 << 16)))
            footer_bytes = int.from_bytes(end[-_FOOTER_END : 4 - _FOOTER_END], "little") + _FOOTER_END
            if len(end) < footer_bytes <= size:
                end = file.read_at(footer_bytes, size - footer_bytes)
            if size != shard.file_bytes or _sha256(_footer(end)) != shard.footer_sha256:
                raise DamagedShardError(
                    f"corpus: {self.location(shard)} is not the file that corpus.json describes; prepare it again, and "
                    "start anew what reads it"
                )
            return _OpenShard(file, pq.read_metadata(pa.BufferReader(end)))
        except FileNotFoundError as error:
            raise DamagedShardError(f"corpus: {self.location(shard)} is missing; prepare it again") from error
        except (OSError, pa.ArrowException) as error:
            problem = without_credentials(str(error))
            raise UnreadableShardError(f"corpus: {self.location(shard)} cannot be read: {problem}") from error
