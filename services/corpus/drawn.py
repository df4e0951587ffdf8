"""Draw the documents of a corpus: each text once, split into train and held-out, the train text without shared runs.

Work goes over the buckets of `runs.Runs` in three rounds: their sizes, which say where the held-out documents end; the
hashes of the held-out text; and the choice of documents for every split. The text lies on disk meanwhile, and so do 8
bytes for each word of the held-out text (with `shared_run_bytes`), of which the processes share a table of at most
256 MiB. In memory a process holds a run, a bucket or a shard; this one some 100 bytes for each bucket as well.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from fusion_core.arrays import Bool
from services.base.errors import SettingError
from services.base.home import exclusive
from services.base.processes import Workers, available_cores
from services.corpus.config import CorpusConfig
from services.corpus.document import Document
from services.corpus.ledger import HELD_OUT, TRAIN
from services.corpus.planning import Piece, ShardTask, SplitPlan, splits_of
from services.corpus.runs import Bucket, Runs
from services.corpus.split import RunTable, run_hashes

_PARQUET_FACTOR = 4
"""Estimated bytes of text in a byte of a Parquet file."""
_WORKER_BYTES = 1 << 26
"""Bytes of text that another process is worth its start for."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Approximate bytes of documents: in a run and in a bucket, which a process holds in memory, and in a shard."""

    run: int = 1 << 25
    bucket: int = 1 << 25
    shard: int = 1 << 25


@dataclass(frozen=True, slots=True)
class Draw:
    """The drawn documents on disk, for every process.

    Attributes:
        runs: all documents.
        held_out_bytes: documents that start before this offset are held out.
        starts: offset of each bucket.
    """

    runs: Runs
    held_out_bytes: float
    starts: tuple[int, ...]

    def documents(self, split: SplitPlan, task: ShardTask) -> Iterator[Document]:
        """Yield the documents of a shard."""
        for piece in task.pieces:
            bucket = self.runs.bucket(piece.bucket)
            chosen_N = self.chosen(split, piece.bucket, bucket)
            lengths_N = np.where(chosen_N, bucket.lengths_N, 0)
            starts_N = piece.start + np.cumsum(lengths_N) - lengths_N
            yield from bucket.documents(chosen_N & (task.first <= starts_N) & (starts_N < task.end))

    def chosen(self, split: SplitPlan, number: int, bucket: Bucket) -> Bool:
        """Return which documents of a bucket belong to a split."""
        if split.name == HELD_OUT:
            return self._held_out(number, bucket)
        kept_N: Bool = np.frombuffer(self._kept_file(number).read_bytes(), np.bool_)
        if split.pool is None:
            return kept_N
        pairs = zip(bucket.lengths_N.tolist(), bucket.domains(), strict=True)
        return kept_N & np.fromiter((split.takes(*pair) for pair in pairs), np.bool_, len(kept_N))

    def hash_held_out(self, number: int) -> Path:
        """Write the hashes of the runs of a bucket's held-out documents, and return the file."""
        bucket, run_bytes = self.runs.bucket(number), self.runs.config.shared_run_bytes
        assert run_bytes is not None, "hashes are for those who look for shared runs"
        texts = bucket.texts(self._held_out(number, bucket))
        hashes = [np.zeros(0, np.uint64), *(run_hashes(text, run_bytes) for text in texts)]
        path = self.runs.folder / f"hashes-{number}"
        path.write_bytes(np.unique(np.concatenate(hashes)).data)
        return path

    def choose(self, number: int) -> Chosen:
        """Find the train documents of a bucket that share no run with held-out ones, and count for every split."""
        config, bucket = self.runs.config, self.runs.bucket(number)
        train_N = ~self._held_out(number, bucket)
        kept_N = train_N.copy()
        if config.shared_run_bytes is not None and train_N.any():
            table, run_bytes = RunTable.open(self.runs.folder), config.shared_run_bytes
            kept_N[train_N] = [not table.holds(run_hashes(text, run_bytes)) for text in bucket.texts(train_N)]
        self._kept_file(number).write_bytes(kept_N.data)
        num_bytes = {
            split.name: int(bucket.lengths_N[self.chosen(split, number, bucket)].sum()) for split in splits_of(config)
        }
        return Chosen(num_bytes, int(train_N.sum()), int(kept_N.sum()), bucket.keys(kept_N))

    def _held_out(self, number: int, bucket: Bucket) -> Bool:
        found: Bool = self.starts[number] + bucket.starts() < self.held_out_bytes
        return found

    def _kept_file(self, number: int) -> Path:
        return self.runs.folder / f"kept-{number}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A bucket's documents.

    Attributes:
        num_bytes: by split.
        num_train: documents that are not held out.
        num_kept: those of them that share no run with held-out ones.
        keys: hashes of these in order, 32 bytes each.
    """

    num_bytes: Mapping[str, int]
    num_train: int
    num_kept: int
    keys: bytes


class DrawnDocuments:
    """The documents of a corpus in a temporary folder beside `place`, which goes with this object.

    Attributes:
        num_documents: documents with text, each text counted once.
        num_duplicates: documents whose text came before.
        num_dropped: train documents that share a run with held-out ones.
        fingerprint: hash of the train text and its cap.
        num_workers: processes that work on the documents.

    Raises SettingError when a split would be empty, and what reading the files raises.
    """

    def __init__(self, files: Sequence[Path], config: CorpusConfig, place: Path, sizes: Sizes) -> None:
        self._sizes, self._config = sizes, config
        text_bytes = sum(path.stat().st_size * (_PARQUET_FACTOR if path.suffix == ".parquet" else 1) for path in files)
        self.num_workers = config.workers or max(1, min(available_cores(), text_bytes // _WORKER_BYTES))
        # The lock also keeps others from taking a folder without its lock for one that was left behind.
        with exclusive(place.with_name(f"{place.name}-documents")):
            folder, lock = _fresh_folder(place)
            self._finalizer = weakref.finalize(self, _discard, folder, lock)
            root = Path(os.path.commonpath([path.parent for path in files]))
            runs = Runs(folder, config, root, max(1, -(-text_bytes // sizes.bucket)), sizes.run)
            with Workers(self.num_workers) as workers:
                self._read(workers, [(runs, *task) for task in _tasks(files, sizes.run)])
                self._draw = self._hold_out(runs, workers)
                self._choose(workers)

    def train_texts(self, max_bytes: int | None) -> Iterator[str]:
        """Yield the train documents, the last one cut so that all have at most `max_bytes` together."""
        left = max_bytes if max_bytes is not None else sum(self._num_bytes[TRAIN])
        [train] = [split for split in splits_of(self._config) if split.name == TRAIN]
        for number in range(self._draw.runs.num_buckets):
            if left <= 0:
                return
            bucket = self._draw.runs.bucket(number)
            for text in bucket.texts(self._draw.chosen(train, number, bucket)):
                if left <= 0:
                    return
                yield text[:left].decode("utf-8", errors="ignore")
                left -= len(text)

    @property
    def draw(self) -> Draw:
        """The documents, for processes that plan shards."""
        return self._draw

    def shards(self, split: SplitPlan) -> Iterator[ShardTask]:
        """Yield the shards of a split; none where no document belongs to it.

        A shard's documents start within `Sizes.shard` bytes of the split, however the text is divided into buckets.
        """
        sizes = self._num_bytes[split.name]
        starts, total, first_bucket = np.cumsum([0, *sizes]).tolist(), sum(sizes), 0
        for number, first in enumerate(range(0, total, self._sizes.shard)):
            end = first + self._sizes.shard
            while starts[first_bucket + 1] <= first:
                first_bucket += 1
            pieces = []
            for bucket in range(first_bucket, len(sizes)):
                if starts[bucket] >= end:
                    break
                if sizes[bucket]:
                    pieces.append(Piece(bucket, starts[bucket]))
            yield ShardTask(f"{split.name}/{number:05}.parquet", first, end, tuple(pieces))

    def _read(self, workers: Workers, tasks: Sequence[tuple[Runs, int, list[Path]]]) -> None:
        counts = np.zeros(2, np.int64)
        for found in workers.in_order(Runs.write, tasks):
            counts += found
        if not counts[0]:
            setting = "files" if self._config.files is not None else "package.glob"
            raise SettingError(setting, "there is no text in them")
        if self._config.domain_field is not None and not counts[1]:
            raise SettingError("domain_field", f"no record has {self._config.domain_field!r}")
        self._num_read = int(counts[0])

    def _hold_out(self, runs: Runs, workers: Workers) -> Draw:
        """Return the draw: documents are held out up to the share of the bytes, the hashes of their runs on disk."""
        sizes = list(workers.in_order(_size, [(runs, number) for number in range(runs.num_buckets)]))
        self.num_documents = sum(size.num_documents for size in sizes)
        self.num_duplicates = self._num_read - self.num_documents
        starts = np.cumsum([0, *(size.num_bytes for size in sizes)]).tolist()
        wanted = self._config.held_out_share * starts[-1]
        last = [size.last_bytes for size in sizes if size.num_documents][-1]
        if starts[-1] - last < wanted:
            raise SettingError(
                "held_out_share",
                f"nothing is left for training, the text has {self.num_documents} document(s); "
                "documents are never cut in two: give more files, a smaller share, or a `separator`",
            )
        draw = Draw(runs, wanted, tuple(starts[:-1]))
        if self._config.shared_run_bytes is not None:
            tasks = [(draw, number) for number, start in enumerate(draw.starts) if start < wanted]
            files = list(workers.in_order(Draw.hash_held_out, tasks))
            RunTable.merge(files, runs.folder)
        return draw

    def _choose(self, workers: Workers) -> None:
        num_train = num_kept = 0
        digest = hashlib.sha256(f"{self._config.train_bytes};".encode())
        self._num_bytes: dict[str, list[int]] = {split.name: [] for split in splits_of(self._config)}
        tasks = [(self._draw, number) for number in range(self._draw.runs.num_buckets)]
        for chosen in workers.in_order(Draw.choose, tasks):
            num_train += chosen.num_train
            num_kept += chosen.num_kept
            digest.update(chosen.keys)
            for name, num_bytes in chosen.num_bytes.items():
                self._num_bytes[name].append(num_bytes)
        self.num_dropped, self.fingerprint = num_train - num_kept, digest.hexdigest()
        if self.num_dropped:
            _log.warning(
                "%d of %d train documents repeat text of held-out ones and are left out", self.num_dropped, num_train
            )
        if not num_kept:
            run_bytes = self._config.shared_run_bytes
            raise SettingError("shared_run_bytes", f"every train document shares {run_bytes} bytes with held-out")


@dataclass(frozen=True, slots=True)
class _Size:
    num_documents: int
    num_bytes: int
    last_bytes: int


def _size(runs: Runs, number: int) -> _Size:
    lengths_N = runs.bucket(number).lengths_N
    return _Size(len(lengths_N), int(lengths_N.sum()), int(lengths_N[-1]) if len(lengths_N) else 0)


def _tasks(files: Sequence[Path], run_bytes: int) -> Iterator[tuple[int, list[Path]]]:
    """Yield files that are read together, of about a run each; a file is read by one process."""
    together, num_bytes, number = list[Path](), 0, 0
    for path in files:
        together.append(path)
        num_bytes += path.stat().st_size
        if num_bytes >= run_bytes:
            yield number, together
            together, num_bytes, number = [], 0, number + 1
    if together:
        yield number, together


def _fresh_folder(place: Path) -> tuple[Path, FileLock]:
    """Return an empty folder beside `place` and its lock; folders of killed processes, whose locks are free, go."""
    for left in place.parent.glob(f".{glob.escape(place.name)}-documents.*/"):
        with suppress(Timeout), FileLock(left / "lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder = place.with_name(f".{place.name}-documents.{os.urandom(4).hex()}")
    folder.mkdir()
    lock = FileLock(folder / "lock")
    lock.acquire()
    return folder, lock


def _discard(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
