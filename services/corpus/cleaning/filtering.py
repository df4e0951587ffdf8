"""A step that looks at every document of a shard and keeps it, changed or not, or drops it with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from services.corpus.cleaning.shards import (
    DROPPED,
    KEPT,
    Drop,
    RawDocument,
    ShardWriter,
    StepFiles,
)
from services.corpus.cleaning.tally import Tally

Judge = Callable[[list[RawDocument], Tally], list[Drop | None]]
"""Returns a reason for each document that is dropped, None for the others, whose text it may change."""


class Filter(Protocol):
    """A step's settings, sent to the process that runs a task."""

    def open(self, task: int) -> Judge:
        """Return the judge of a task's documents; it is called with them in order, a batch at a time."""


def filter_shard(source: StepFiles, chosen: Filter, task: int, folder: Path) -> Tally:
    """Filter a shard of the step `source` into `folder`."""
    judge, tally = chosen.open(task), Tally()
    with ShardWriter(folder / KEPT) as kept, ShardWriter(folder / DROPPED, with_reasons=True) as dropped:
        for batch in source.documents(task):
            sizes = [document.num_bytes for document in batch]
            for document, num_bytes, found in zip(batch, sizes, judge(batch, tally), strict=True):
                tally.take(num_bytes)
                drop = found if found or document.text.strip() else Drop("empty", "nothing is left of it")
                if drop is None:
                    kept.write(document)
                    tally.keep(document.num_bytes)
                else:
                    dropped.write(document, drop)
                    tally.drop(document, drop, num_bytes)
    return tally
