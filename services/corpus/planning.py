"""Plan the windows of a shard: some documents of a split, cut for every reader, as the bytes of a Parquet file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from services.corpus.config import CorpusConfig, PoolConfig
from services.corpus.document import Conversation, Document
from services.corpus.ledger import HELD_OUT, TRAIN
from services.corpus.shards import SCHEMA, TURN_SCHEMA, Shard, encode_shard, group_rows
from services.corpus.turns import PlannedTurn, TurnPlanner
from services.corpus.windows import PlannedWindow, Reader, plan_windows

_BATCH_BYTES = 1 << 20
"""Approximate bytes of text in one batch of documents that are planned together: their tokens take 50 times as much."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A split to be planned.

    Attributes:
        name: `train`, `held_out` or `train/POOL`.
        setting: the setting to name where no window fits.
        config: of the corpus.
        window_bytes: longest window.
        max_bytes: most bytes of all windows together; None for no limit.
        pool: which of the train documents; None for all.
    """

    name: str
    setting: str
    config: CorpusConfig
    window_bytes: int
    max_bytes: int | None
    pool: PoolConfig | None = None

    def takes(self, num_bytes: int, domain: str) -> bool:
        """Return whether a document of so many bytes and this domain belongs to the split."""
        pool = self.pool
        if pool is None:
            return True
        most = num_bytes if pool.max_document_bytes is None else pool.max_document_bytes
        return pool.min_document_bytes <= num_bytes <= most and (pool.domains is None or domain in pool.domains)

    @property
    def windows_per_group(self) -> int:
        """The number of windows in a row group."""
        before = self.config.max_history_bytes if self.config.is_conversations else 0
        return group_rows(self.window_bytes + before)


def splits_of(config: CorpusConfig) -> list[SplitPlan]:
    """Return the splits of a corpus: train, held_out, and a further one for each pool."""
    window_bytes = config.window_bytes
    return [
        SplitPlan(TRAIN, "train_bytes", config, window_bytes, config.train_bytes),
        SplitPlan(HELD_OUT, "held_out_bytes", config, window_bytes, config.held_out_bytes),
        *(
            SplitPlan(
                f"{TRAIN}/{name}", f"pools.{name}", config, pool.window_bytes or window_bytes, config.train_bytes, pool
            )
            for name, pool in config.pools.items()
        ),
    ]


@dataclass(frozen=True, slots=True)
class Piece:
    """A bucket of which a shard has documents; `start` is the offset of its first document in the split."""

    bucket: int
    start: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be planned: the documents of a split that start at first..end-1, from some buckets."""

    file: str
    first: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class Tally:
    """Numbers of a split, summed over its shards.

    Attributes:
        counts: by the ledger's keys, such as num_windows.
        left_out, refused_by: of conversations, as `TurnPlanner` counts them.
    """

    counts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    refused_by: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add the numbers of another shard."""
        self.counts.update(other.counts)
        self.left_out.update(other.left_out)
        self.refused_by.update(other.refused_by)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """The windows of a shard.

    Attributes:
        data, shard: the file's bytes and its entry in the index; empty and None without any window.
        tally: its numbers.
        is_cut: whether windows were left out because of the cap.
    """

    data: bytes
    shard: Shard | None
    tally: Tally
    is_cut: bool


def plan_shard(
    split: SplitPlan, file: str, documents: Iterable[Document], readers: Sequence[Reader], max_bytes: int | None
) -> PlannedShard:
    """Cut documents of a split into windows, up to `max_bytes` in total, for the shard `file`.

    Raises ValueError naming the reader for which even a single character is too long.
    """
    tally, rows, last = Tally(), list[tuple[object, ...]](), None
    turns = split.config.is_conversations
    windows = _turns(split, documents, readers, tally) if turns else _windows(split, documents, readers)
    counts, is_cut = tally.counts, False
    for document, window, ends_document in windows:
        text = document.text[window.start : window.end]
        if max_bytes is not None and counts["num_bytes"] + len(text) > max_bytes:
            is_cut = True
            break
        place = (text, document.name, window.start, window.context_start, ends_document)
        row: tuple[object, ...] = (*place, document.domain, len(document.text))
        if isinstance(window, PlannedTurn):
            row += (window.messages, window.turn)
        else:
            counts["num_cuts"] += window.start > 0
            counts["num_cuts_at_boundaries"] += window.start > 0 and window.at_boundary
        rows.append(row)
        counts["num_bytes"] += len(text)
        counts["num_shortened_contexts"] += window.shortened
        counts["num_documents"] += document is not last
        last = document
    counts["num_windows"] = len(rows)
    if not rows:
        return PlannedShard(b"", None, tally, is_cut)
    schema = TURN_SCHEMA if turns else SCHEMA
    return PlannedShard(*encode_shard(file, rows, schema, split.windows_per_group), tally, is_cut)


def write_shards(planned: Iterable[PlannedShard], write: Callable[[str, bytes], None]) -> tuple[list[Shard], Tally]:
    """Write the shards of a split and return their index and the numbers of all."""
    shards, tally = list[Shard](), Tally()
    for each in planned:
        tally.add(each.tally)
        if each.shard is not None:
            write(each.shard.file, each.data)
            shards.append(each.shard)
    return shards, tally


def _turns(
    split: SplitPlan, documents: Iterable[Document], readers: Sequence[Reader], tally: Tally
) -> Iterator[tuple[Document, PlannedTurn, bool]]:
    """Yield the windows of conversations as `_windows` does those of documents."""
    planner = TurnPlanner(split.window_bytes, split.config.max_history_bytes, readers)
    tally.left_out, tally.refused_by = planner.left_out, planner.refused_by
    for document in documents:
        assert isinstance(document, Conversation), "the format decides what is read"
        for turn in planner.plan(document):
            yield document, turn, turn.ends


def _windows(
    split: SplitPlan, documents: Iterable[Document], readers: Sequence[Reader]
) -> Iterator[tuple[Document, PlannedWindow, bool]]:
    """Yield the windows of the documents, and whether the document ends with each; blank windows are left out."""
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        plans = plan_windows(texts, split.window_bytes, split.config.context_bytes, readers)
        for document, windows in zip(batch, plans, strict=True):
            written = [window for window in windows if not window.blank]
            for window in written:
                yield document, window, window is written[-1]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.text)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
