"""Windows that were scored for a stream or a call: found by key, written many to a file."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from services.base.files import Files
from services.store.index import KeyIndex
from services.store.rows import row_keys
from services.store.shard import UNREADABLE, OpenShard, ShardRecord, read_record, write_shard
from services.store.shard_reader import ShardReader

logger = logging.getLogger("ray.serve")

REFRESH_SECONDS = 30.0
"""Longest time until a shard that another process wrote is found."""
_REFRESH_AT_ONCE_SECONDS = 1.0
"""The same where an indexed shard is gone, because another process has merged it into a larger one."""
_FLUSH_SECONDS = 30.0
"""Longest time that a window waits in memory for others to share its file."""
_FLUSH_WINDOWS = 256
_MERGED_SHARDS = 16
"""Number of partly filled shards that are merged into one."""
_RECORD_READERS = 16


class UncapturedWindows:
    """The windows of one source below IDENTITY/kept, in memory until they are flushed.

    Several threads and processes may use them at once. Each process merges the shards that it wrote itself; another one
    that kept the same windows, in a shard of the same name, may have merged and deleted it before.
    `before_flush` may raise one of `UNREADABLE`.
    """

    def __init__(self, files: Files, folder: str, reader: ShardReader, before_flush: Callable[[], None]) -> None:
        self._files, self._folder, self._reader = files, folder, reader
        self._before_flush = before_flush
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._refreshing = threading.Lock()
        self._pending: dict[bytes, pa.RecordBatch] = {}
        self._timer: threading.Timer | None = None
        self._partly_filled: list[str] = []
        self._index = KeyIndex()
        self._indexed: dict[str, int] = {}
        self._paths: list[str] = []
        self._refreshed: float | None = None

    def pending(self, key: bytes) -> pa.RecordBatch | None:
        """Return a window that is still in memory, as a batch of one row."""
        with self._lock:
            return self._pending.get(key)

    def indexed(self, key: bytes) -> pa.RecordBatch | None:
        """Return a window from the shards that are known; None when it is in none of them."""
        for path, row in self._candidates(key):
            if (found := self._reader.row(path, row, key)) is not None:
                return found
        return None

    def listed(self, key: bytes) -> pa.RecordBatch | None:
        """Return a window that another process has written, after a look at the folder if the last is long ago."""
        gone = any(self._reader.is_missing(path) for path, _ in self._candidates(key))
        self._refresh(_REFRESH_AT_ONCE_SECONDS if gone else REFRESH_SECONDS)
        return self.indexed(key)

    def put(self, key: bytes, row: pa.RecordBatch) -> bool:
        """Hold a window until the next flush, at most `_FLUSH_SECONDS`; return whether a flush is due now."""
        with self._lock:
            self._pending[key] = row
            if self._timer is None:
                self._timer = threading.Timer(_FLUSH_SECONDS, self.flush)
                self._timer.daemon = True
                self._timer.start()
            return len(self._pending) >= _FLUSH_WINDOWS

    def flush(self) -> None:
        """Write the windows in memory; one that cannot be written is dropped with a warning and scored again later."""
        with self._flushing:
            with self._lock:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = None
                rows = dict(self._pending)
            if not rows:
                return
            try:
                self._before_flush()
                path = self._write(list(rows.values()))
                if len(rows) < _FLUSH_WINDOWS:
                    self._partly_filled.append(path)
                if len(self._partly_filled) >= _MERGED_SHARDS:
                    self._merge()
            except UNREADABLE as error:
                where = self._files.location(self._folder)
                logger.warning("service.store: cannot keep %d windows in %s: %s", len(rows), where, error)
            with self._lock:
                self._pending = {key: row for key, row in self._pending.items() if rows.get(key) is not row}

    def shards(self) -> list[str]:
        """Return the paths of all shards in the folder, those without a record or without rows among them."""
        names = {name.rpartition(".")[0] for name in self._files.sizes(self._folder)}
        return [f"{self._folder}/{name}" for name in sorted(names)]

    def delete(self, path: str) -> None:
        """Delete a shard; its record first, without which it does not count."""
        self._files.delete(f"{path}.json")
        self._files.delete(f"{path}.parquet")

    def _candidates(self, key: bytes) -> list[tuple[str, int]]:
        with self._lock:
            return [(self._paths[shard], row) for shard, row in self._index.find(key)]

    def _write(self, rows: list[pa.RecordBatch]) -> str:
        keys = b"".join(key for row in rows for key in row_keys(row))
        path = f"{self._folder}/{hashlib.sha256(keys).hexdigest()[:32]}"
        self._add(path, write_shard(self._files, path, rows))
        return path

    def _merge(self) -> None:
        """Write the rows of all partly filled shards as one shard, and delete those."""
        rows: dict[bytes, pa.RecordBatch] = {}
        merged = []
        for path in self._partly_filled:
            try:
                shard = OpenShard(self._files, path)
                found = [shard.row(number) for number in range(shard.num_rows)]
            except FileNotFoundError:
                continue  # merged by another process, whose shard holds the rows now
            except UNREADABLE as error:
                logger.warning("service.store: %s is left as it is: %s", self._files.location(path), error)
                continue
            rows |= {row_keys(row)[0]: row for row in found}
            merged.append(path)
        if rows:
            written = self._write(list(rows.values()))
            for path in merged:
                if path != written:
                    self.delete(path)
        self._partly_filled = []

    def _refresh(self, at_most_every_seconds: float) -> None:
        """Index the shards of other processes. Only the first look at the folder makes a thread wait here."""
        with self._lock:
            first = self._refreshed is None
        if not self._refreshing.acquire(blocking=first):
            return
        try:
            if self._refreshed is not None and time.monotonic() - self._refreshed < at_most_every_seconds:
                return
            self._reader.try_again()
            paths = [path for path in self._recorded() if path not in self._indexed]
            with ThreadPoolExecutor(_RECORD_READERS) as pool:
                for path, record in zip(paths, pool.map(self._record, paths), strict=True):
                    if record is not None:
                        self._add(path, record)
            with self._lock:
                self._refreshed = time.monotonic()
        finally:
            self._refreshing.release()

    def _recorded(self) -> list[str]:
        try:
            names = self._files.sizes(self._folder)
        except UNREADABLE as error:
            logger.warning("service.store: cannot list %s: %s", self._files.location(self._folder), error)
            return []
        return [f"{self._folder}/{name.removesuffix('.json')}" for name in names if name.endswith(".json")]

    def _record(self, path: str) -> ShardRecord | None:
        try:
            return read_record(self._files, path)
        except UNREADABLE as error:
            logger.warning("service.store: %s: %s", self._files.location(f"{path}.json"), error)
            return None

    def _add(self, path: str, record: ShardRecord) -> None:
        with self._lock:
            if path not in self._indexed:
                self._indexed[path] = len(self._paths)
                self._paths.append(path)
                self._index.add(self._indexed[path], record.keys)
        self._reader.written(path)
