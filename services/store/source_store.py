"""The scored windows of one source: those of captured splits by place, all by key."""

from __future__ import annotations

import logging
import threading
import time

import pyarrow as pa

from fusion_core.blocks import Block
from services.base.files import Files
from services.store.capture_plan import CapturePlan, Place, capture_folder, read_complete, read_plan, shard_path
from services.store.captured_keys import find_key
from services.store.identity import SourceIdentity
from services.store.rows import decode_row, encode_row
from services.store.shard import UNREADABLE
from services.store.shard_reader import ShardReader
from services.store.uncaptured import REFRESH_SECONDS, UncapturedWindows

logger = logging.getLogger("ray.serve")


class SourceStore:
    """The windows of one source. May be used from several threads, and by several processes at once.

    A window that cannot be read counts as absent; one that cannot be written is dropped with a warning.
    """

    def __init__(self, files: Files, identity: SourceIdentity) -> None:
        self.files, self.identity = files, identity
        self.folder = identity.digest
        self._reader = ShardReader(files)
        self._uncaptured = UncapturedWindows(files, f"{self.folder}/kept", self._reader, self._begin)
        self._captures = _Captures(files, self.folder, self._reader)
        self._swept = False

    def find(self, key: bytes, place: Place | None = None) -> Block | None:
        """Return the block of a window, or None; where its split was captured, `place` finds it without an index."""
        if (found := self.find_row(key, place)) is None:
            return None
        try:
            return decode_row(found, 0, self.identity.vocabulary)
        except UNREADABLE as error:
            where = self.files.location(self.folder)
            logger.warning("service.store: a window in %s cannot be decoded: %s", where, error)
            return None

    def find_row(self, key: bytes, place: Place | None = None) -> pa.RecordBatch | None:
        """Return a window as it lies in the store, a batch of one row, or None."""
        found = self._uncaptured.pending(key)
        if found is None and place is not None:
            found = self._captures.at(place, key)
        if found is None:
            found = self._uncaptured.indexed(key)
        if found is None:
            found = self._captures.by_key(key)
        return self._uncaptured.listed(key) if found is None else found

    def put(self, key: bytes, block: Block) -> None:
        """Store a window: it is found at once, and written together with others soon.

        Raises ValueError for a block that contradicts itself.
        """
        if self._uncaptured.put(key, encode_row(key, block)):
            self.flush()

    def flush(self) -> None:
        """Write the windows that are only in memory; those that do not fit the disk are scored again later."""
        self._uncaptured.flush()

    def ignore_shard(self, path: str) -> None:
        """Read no window from a shard any more: it was found damaged."""
        self._reader.ignore(path)

    def write_identity(self) -> None:
        """Write the source's identity into the store, unless it is there."""
        path = f"{self.folder}/source.json"
        if self.files.read(path) is None:
            self.files.write(path, self.identity.model_dump_json(indent=2).encode() + b"\n")

    def has_capture(self, split_fingerprint: str) -> bool:
        """Return whether the split's capture was brought to its end."""
        return read_complete(self.files, capture_folder(self.folder, split_fingerprint)) is not None

    def uncaptured_shards(self) -> list[str]:
        """Return the paths of the shards of windows that were not captured, whole or not."""
        return self._uncaptured.shards()

    def delete_shard(self, path: str) -> None:
        """Delete a shard of windows that were not captured."""
        self._uncaptured.delete(path)

    def _begin(self) -> None:
        """Write the identity; the first time, delete the partial files of killed writers."""
        if not self._swept:
            self.files.sweep(self.folder)
            self.files.sweep(f"{self.folder}/kept")
            self._swept = True
        self.write_identity()


class _Captures:
    """The captured splits of a source: their plans are remembered, their shards never listed."""

    def __init__(self, files: Files, source_folder: str, reader: ShardReader) -> None:
        self._files, self._source_folder, self._reader = files, source_folder, reader
        self._lock = threading.Lock()
        self._plans: dict[str, tuple[CapturePlan | None, float]] = {}
        self._folders: tuple[list[str], float] = ([], float("-inf"))

    def at(self, place: Place, key: bytes) -> pa.RecordBatch | None:
        """Return the window at a place when it is there and has this key."""
        return self._row(capture_folder(self._source_folder, place.split_fingerprint), place.index, key)

    def by_key(self, key: bytes) -> pa.RecordBatch | None:
        """Return the window with this key from any split whose capture was brought to its end."""
        for folder in self._known_folders():
            try:
                index = find_key(self._files, folder, key)
            except UNREADABLE as error:
                logger.warning("service.store: keys of %s: %s", self._files.location(folder), error)
                continue
            if index is not None and (found := self._row(folder, index, key)) is not None:
                return found
        return None

    def _row(self, folder: str, index: int, key: bytes) -> pa.RecordBatch | None:
        plan = self._plan(folder)
        if plan is None:
            return None
        shard, row = divmod(index, plan.windows_per_shard)
        return self._reader.row(shard_path(folder, shard), row, key)

    def _plan(self, folder: str) -> CapturePlan | None:
        """Return the plan of a capture. A plan never changes once it is written; a missing one is looked for again."""
        with self._lock:
            plan, read_at = self._plans.get(folder, (None, float("-inf")))
        if plan is None and time.monotonic() - read_at > REFRESH_SECONDS:
            try:
                plan = read_plan(self._files, folder)
            except UNREADABLE as error:
                logger.warning("service.store: plan of %s: %s", self._files.location(folder), error)
            with self._lock:
                self._plans[folder] = plan, time.monotonic()
        return plan

    def _known_folders(self) -> list[str]:
        with self._lock:
            folders, listed_at = self._folders
        if time.monotonic() - listed_at > REFRESH_SECONDS:
            parent = f"{self._source_folder}/captures"
            try:
                folders = [f"{parent}/{name}" for name in self._files.folders(parent)]
            except UNREADABLE as error:
                logger.warning("service.store: cannot list %s: %s", self._files.location(parent), error)
            with self._lock:
                self._folders = folders, time.monotonic()
        return folders
