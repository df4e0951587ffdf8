"""The scored windows of one source: found by place or key, misses kept many to a file."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from fusion_core.blocks import Block
from services.base.files import Files
from services.store.capture_plan import (
    NOT_SHARDS,
    CapturePlan,
    Place,
    capture_folder,
    read_complete,
    read_plan,
    shard_path,
)
from services.store.identity import SourceIdentity
from services.store.index import KeyIndex
from services.store.rows import decode_row, encode_row, row_keys
from services.store.shard import UNREADABLE, OpenShard, ShardRecord, read_record, write_shard

logger = logging.getLogger("ray.serve")


_REFRESH_SECONDS = 30.0
"""How long a shard that another process wrote may go unseen."""


_FLUSH_SECONDS = 30.0
"""How long a window may wait in memory for others to share its file."""


_FLUSH_WINDOWS = 256


_SMALL_SHARDS = 16
"""So many shards that were flushed before they were full become one."""


_OPEN_SHARDS = 64


class SourceStore:
    """The windows of one source. May be used from several threads, and by several processes at once.

    A window that cannot be read counts as absent; what cannot be written is lost with a warning.
    """

    def __init__(self, files: Files, identity: SourceIdentity) -> None:
        self.files, self.identity = files, identity
        self.folder = identity.digest
        self._lock = threading.RLock()
        self._flushing = threading.Lock()
        self._pending: dict[bytes, pa.RecordBatch] = {}
        self._timer: threading.Timer | None = None
        self._small: list[str] = []
        self._index = KeyIndex()
        self._indexed: dict[str, int] = {}
        self._paths: list[str] = []
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._absent: set[str] = set()
        self._ignored: set[str] = set()
        self._plans: dict[str, CapturePlan | None] = {}
        self._refreshed = float("-inf")

    def find(self, key: bytes, place: Place | None = None) -> Block | None:
        """The block of a window; `place` finds it without an index where its split was captured."""
        if (found := self.find_row(key, place)) is None:
            return None
        try:
            return decode_row(found, 0, self.identity.vocabulary)
        except UNREADABLE as error:
            logger.warning(
                "service.store: a window in %s cannot be decoded: %s", self.files.location(self.folder), error
            )
            return None

    def find_row(self, key: bytes, place: Place | None = None) -> pa.RecordBatch | None:
        """The same as it lies in the store: a batch of one row."""
        with self._lock:
            if key in self._pending:
                return self._pending[key]
        if place is not None and (plan := self._plan(place.split_fingerprint)) is not None:
            shard, row = divmod(place.index, plan.windows_per_shard)
            path = shard_path(capture_folder(self.folder, place.split_fingerprint), shard)
            if (found := self._read(path, row, key)) is not None:
                return found
        self._refresh()
        with self._lock:
            candidates = [(self._paths[shard], row) for shard, row in self._index.find(key)]
        return next((found for path, row in candidates if (found := self._read(path, row, key)) is not None), None)

    def ignore_shard(self, path: str) -> None:
        """No window is read from this shard: it was found damaged."""
        with self._lock:
            self._ignored.add(path)

    def put(self, key: bytes, block: Block) -> None:
        """Keeps a window: it is found at once, and written together with others soon. Raises ValueError for a block
        that contradicts itself."""
        row = encode_row(key, block)
        with self._lock:
            self._pending[key] = row
            full = len(self._pending) >= _FLUSH_WINDOWS
            if self._timer is None:
                self._timer = threading.Timer(_FLUSH_SECONDS, self.flush)
                self._timer.daemon = True
                self._timer.start()
        if full:
            self.flush()

    def flush(self) -> None:
        """Writes what is only in memory; a full disk costs the next pass, not this one."""
        with self._flushing:
            with self._lock:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = None
                rows = dict(self._pending)
            if not rows:
                return
            try:
                self.write_identity()
                path = self._write_kept(list(rows.values()))
                if len(rows) < _FLUSH_WINDOWS:
                    self._small.append(path)
                if len(self._small) >= _SMALL_SHARDS:
                    self._merge_small()
            except UNREADABLE as error:
                place = self.files.location(self.folder)
                logger.warning("service.store: cannot keep %d windows in %s: %s", len(rows), place, error)
            with self._lock:
                self._pending = {key: row for key, row in self._pending.items() if rows.get(key) is not row}

    def write_identity(self) -> None:
        """Says in the store whose windows these are."""
        path = f"{self.folder}/source.json"
        if self.files.read(path) is None:
            self.files.write(path, self.identity.model_dump_json(indent=2).encode() + b"\n")

    def has_capture(self, split_fingerprint: str) -> bool:
        """Whether the split's capture was brought to its end."""
        return read_complete(self.files, capture_folder(self.folder, split_fingerprint)) is not None

    def uncaptured_shards(self) -> list[str]:
        """Shards of windows that were not captured, whole or not."""
        names = {name.rpartition(".")[0] for name in self.files.sizes(f"{self.folder}/kept")}
        return [f"{self.folder}/kept/{name}" for name in sorted(names)]

    def delete_shard(self, path: str) -> None:
        """Deletes a shard; one without a record is none, so that goes first."""
        self.files.delete(f"{path}.json")
        self.files.delete(f"{path}.parquet")

    def _write_kept(self, rows: list[pa.RecordBatch]) -> str:
        keys = b"".join(key for row in rows for key in row_keys(row))
        path = f"{self.folder}/kept/{hashlib.sha256(keys).hexdigest()[:32]}"
        self._add(path, write_shard(self.files, path, rows))
        return path

    def _merge_small(self) -> None:
        """Only this process's own: another one merges its own."""
        rows: dict[bytes, pa.RecordBatch] = {}
        for path in self._small:
            shard = OpenShard(self.files, path)
            for number in range(shard.num_rows):
                row = shard.row(number)
                rows[row_keys(row)[0]] = row
        merged, self._small = self._small, []
        written = self._write_kept(list(rows.values()))
        for path in merged:
            if path != written:
                self.delete_shard(path)

    def _plan(self, split_fingerprint: str) -> CapturePlan | None:
        with self._lock:
            if split_fingerprint not in self._plans:
                folder = capture_folder(self.folder, split_fingerprint)
                self._plans[split_fingerprint] = read_plan(self.files, folder)
            return self._plans[split_fingerprint]

    def _read(self, path: str, row: int, key: bytes) -> pa.RecordBatch | None:
        """The row when it is there and has this key. A missing or damaged shard is left alone for a while."""
        try:
            with self._lock:
                if path in self._absent or path in self._ignored:
                    return None
                shard = self._open.get(path)
            found = (shard := shard or OpenShard(self.files, path)).row(row)
            with self._lock:
                self._open[path] = shard
                self._open.move_to_end(path)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
        except FileNotFoundError:
            with self._lock:
                self._absent.add(path)
            return None
        except (*UNREADABLE, IndexError) as error:
            logger.warning("service.store: %s cannot be read: %s", self.files.location(f"{path}.parquet"), error)
            with self._lock:
                self._absent.add(path)
                self._open.pop(path, None)
            return None
        return found if row_keys(found) == [key] else None

    def _refresh(self) -> None:
        """Takes in the records that others have written; at most every `_REFRESH_SECONDS`."""
        with self._lock:
            if time.monotonic() - self._refreshed < _REFRESH_SECONDS:
                return
            self._absent.clear()
            self._plans = {fingerprint: plan for fingerprint, plan in self._plans.items() if plan is not None}
            try:
                captures = f"{self.folder}/captures"
                folders = [f"{captures}/{name}" for name in self.files.folders(captures)]
                found = [
                    f"{folder}/{name.removesuffix('.json')}"
                    for folder in [*folders, f"{self.folder}/kept"]
                    for name in self.files.sizes(folder)
                    if name.endswith(".json") and name not in NOT_SHARDS
                ]
                new = [path for path in found if path not in self._indexed]
                with ThreadPoolExecutor(16) as pool:
                    records = list(pool.map(self._record, new))
            except UNREADABLE as error:
                logger.warning("service.store: cannot list %s: %s", self.files.location(self.folder), error)
                records, new = [], []
            for path, record in zip(new, records, strict=True):
                if record is not None:
                    self._add(path, record)
            self._refreshed = time.monotonic()

    def _record(self, path: str) -> ShardRecord | None:
        try:
            return read_record(self.files, path)
        except UNREADABLE as error:
            logger.warning("service.store: %s: %s", self.files.location(f"{path}.json"), error)
            return None

    def _add(self, path: str, record: ShardRecord) -> None:
        with self._lock:
            if path not in self._indexed:
                self._indexed[path] = len(self._paths)
                self._paths.append(path)
                self._index.add(self._indexed[path], record.keys)
            self._absent.discard(path)
