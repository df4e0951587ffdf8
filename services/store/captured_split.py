"""A split of a corpus as a source scored it: which shards it needs, which of them are good, and what they hold."""

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
from services.store.identity import window_key
from services.store.shard import check_shard, read_record
from services.store.source_store import SourceStore


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
        """What is wrong with a shard, None when nothing is: its hash is compared, with `decode` every row as well."""
        keys = [window_key(self.corpus.window(self.plan.split, index).passage) for index in self.plan.windows(shard)]
        vocabulary = self.store.identity.vocabulary if decode else None
        try:
            check_shard(self.store.files, self.path(shard), keys, vocabulary)
        except ValueError as error:
            return str(error)
        return None

    def begin(self) -> None:
        """Says in the store what is coming."""
        self.store.write_identity()
        write_plan(self.store.files, self.folder, self.plan)

    @property
    def finished(self) -> bool:
        return read_complete(self.store.files, self.folder) is not None

    def finish(self) -> None:
        """Says that every shard is there."""
        write_complete(self.store.files, self.folder, self._digest())

    def problems(self) -> Iterator[tuple[str, str]]:
        """Reads everything back: path and problem of each file that is not as it must be, a step for every shard."""
        files, found = self.store.files, False
        for shard in range(self.plan.num_shards):
            problem = self.problem(shard, decode=True)
            found = found or problem is not None
            yield files.location(f"{self.path(shard)}.parquet"), problem or ""
        digest = read_complete(files, self.folder)
        if digest is None or (not found and digest != self._digest()):
            problem = "the capture was not brought to its end" if digest is None else "is of other shards"
            yield files.location(f"{self.folder}/complete.json"), problem

    def _digest(self) -> str:
        records = (read_record(self.store.files, self.path(shard)) for shard in range(self.plan.num_shards))
        return digest_of(record for record in records if record is not None)
