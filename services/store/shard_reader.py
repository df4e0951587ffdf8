"""Rows of shards by path and row number, for many threads; no lock is held while a file is read."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

import pyarrow as pa

from services.base.files import Files
from services.store.rows import row_keys
from services.store.shard import UNREADABLE, OpenShard

logger = logging.getLogger("ray.serve")

_OPEN_SHARDS = 64


class ShardReader:
    """A reader that keeps the last shards open, and asks no more for those that are missing or damaged."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._missing: set[str] = set()
        self._damaged: set[str] = set()
        self._ignored: set[str] = set()

    def row(self, path: str, number: int, key: bytes) -> pa.RecordBatch | None:
        """Return a row as a batch; None when the shard cannot be read, or the row has another key."""
        with self._lock:
            if path in self._missing or path in self._damaged or path in self._ignored:
                return None
            shard = self._open.get(path)
        try:
            found = (shard := shard or OpenShard(self._files, path)).row(number)
        except FileNotFoundError:
            with self._lock:
                self._missing.add(path)
            return None
        except (*UNREADABLE, IndexError) as error:
            logger.warning("service.store: %s cannot be read: %s", self._files.location(f"{path}.parquet"), error)
            with self._lock:
                self._damaged.add(path)
                self._open.pop(path, None)
            return None
        with self._lock:
            self._open[path] = shard
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return found if row_keys(found) == [key] else None

    def is_missing(self, path: str) -> bool:
        """Return whether a shard was missing at the last attempt to read it."""
        with self._lock:
            return path in self._missing

    def written(self, path: str) -> None:
        """Allow reads of a shard that has just been written."""
        with self._lock:
            self._missing.discard(path)
            self._damaged.discard(path)

    def try_again(self) -> None:
        """Allow reads of shards that were missing or damaged; another process may have written them since."""
        with self._lock:
            self._missing.clear()
            self._damaged.clear()

    def ignore(self, path: str) -> None:
        """Never read a shard again: its contents are wrong."""
        with self._lock:
            self._ignored.add(path)
