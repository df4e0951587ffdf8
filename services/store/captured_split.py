"""A split of a corpus as a source scored it: its shards, whether each is good, and the keys of its windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.corpus.ledger import Corpus
from services.store.capture_plan import (
    CapturePlan,
    capture_folder,
    digest_of,
    read_complete,
    shard_path,
    write_complete,
    write_plan,
)
from services.store.captured_keys import KEYS, has_keys, read_keys, sorted_keys, write_keys
from services.store.identity import window_key
from services.store.shard import check_shard, read_record
from services.store.source_store import SourceStore


def renamed(plan: CapturePlan, corpus: Corpus, split: str) -> CapturePlan:
    """Return the plan of a capture for a split with the same windows; a pool may have had another name."""
    return plan.model_copy(update={"corpus": corpus.name, "split": split})


@dataclass(frozen=True, slots=True)
class CapturedSplit:
    """The windows of one split in the store of one source."""

    store: SourceStore
    corpus: Corpus
    plan: CapturePlan

    @property
    def folder(self) -> str:
        return capture_folder(self.store.folder, self.plan.fingerprint)

    def path(self, shard: int) -> str:
        return shard_path(self.folder, shard)

    def problem(self, shard: int, *, decode: bool = False) -> str | None:
        """Return the problem with a shard, or None: its hash is compared, with `decode` every row decoded too."""
        keys = [window_key(self.corpus.window(self.plan.split, index).passage) for index in self.plan.windows(shard)]
        vocabulary = self.store.identity.vocabulary if decode else None
        try:
            check_shard(self.store.files, self.path(shard), keys, vocabulary)
        except ValueError as error:
            return str(error)
        return None

    def begin(self) -> None:
        """Write the source's identity and the plan of the capture."""
        self.store.files.sweep(self.folder)
        self.store.write_identity()
        write_plan(self.store.files, self.folder, self.plan)

    @property
    def finished(self) -> bool:
        return read_complete(self.store.files, self.folder) is not None

    def finish(self) -> None:
        """Write the keys of all windows, and then the file that marks the capture as complete."""
        digest, keys = self._read_records()
        write_keys(self.store.files, self.folder, keys)
        write_complete(self.store.files, self.folder, digest)

    def add_keys(self) -> None:
        """Write the keys of a finished capture that has none: it was captured by an earlier version."""
        if not has_keys(self.store.files, self.folder):
            write_keys(self.store.files, self.folder, self._read_records()[1])

    def problems(self) -> Iterator[tuple[str, str]]:
        """Read everything back; yield path and problem of every shard, and of each other file that is bad.

        The problem is empty where a shard is good.
        """
        files, damaged = self.store.files, False
        for shard in range(self.plan.num_shards):
            problem = self.problem(shard, decode=True)
            damaged = damaged or problem is not None
            yield files.location(f"{self.path(shard)}.parquet"), problem or ""
        digest = read_complete(files, self.folder)
        if digest is None:
            yield files.location(f"{self.folder}/complete.json"), "the capture was not brought to its end"
        elif not damaged:
            expected, keys = self._read_records()
            if digest != expected:
                yield files.location(f"{self.folder}/complete.json"), "is of other shards"
            if has_keys(files, self.folder) and read_keys(files, self.folder) != keys:
                yield files.location(f"{self.folder}/{KEYS}"), "is of other shards"

    def _read_records(self) -> tuple[str, bytes]:
        """Return the digest over all shards that are there, and the sorted keys of their windows."""
        hashes, keys = [], bytearray()
        for shard in range(self.plan.num_shards):
            if (record := read_record(self.store.files, self.path(shard))) is not None:
                hashes.append(record.sha256)
                keys += b"".join(record.keys)
        return digest_of(hashes), sorted_keys(bytes(keys))
