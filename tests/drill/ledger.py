"""What the consumer has received, a line per window: written like a trainer's checkpoint, read by the judge.

Window and cursor are one line, flushed to the disk before the next window is taken, so that they are stored together
or not at all. Whoever goes on after a crash drops a line that was cut short and resumes from the last whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from services.wire.cursor import Cursor


@dataclass(frozen=True, slots=True)
class Entry:
    """One delivered window.

    Attributes:
        epoch, index: which window.
        digest: of its text and realised tokens, see `digest_of`.
        cursor: position after it.
        at: when it was delivered, seconds of `time.time()`.
        present: the sources that took part in the block.
        wrong: what is wrong with the block, empty when nothing is.
        block: the serialized block in base64, of a sample only.
    """

    epoch: int
    index: int
    digest: str
    cursor: dict[str, Any]
    at: float
    present: list[str]
    wrong: str = ""
    block: str = ""

    def line(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


class LedgerWriter:
    """Appends entries durably; `cursor` is where the last one left off."""

    def __init__(self, path: Path) -> None:
        whole, _, cut_short = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        os.ftruncate(self._file, os.fstat(self._file).st_size - len(cut_short))
        os.lseek(self._file, 0, os.SEEK_END)
        lines = whole.splitlines()
        self.cursor = Cursor.from_json(Entry.parse(lines[-1]).cursor) if lines else None

    def append(self, entry: Entry) -> None:
        os.write(self._file, entry.line())
        os.fsync(self._file)


class LedgerReader:
    """Follows a ledger that is being written; `entries` are those read so far."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self.entries: list[Entry] = []

    def update(self) -> None:
        """Reads what has come since. A consumer's restart cuts off only what was no whole line."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self.entries += [Entry.parse(line) for line in whole.splitlines()]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ledger says in the end; windows are (epoch, index)."""

    delivered: int
    lost: list[tuple[int, int]]
    twice: list[tuple[int, int]]
    wrong: list[str]

    @property
    def sound(self) -> bool:
        return self.delivered > 0 and not (self.lost or self.twice or self.wrong)


def judge(entries: Sequence[Entry], expected: Mapping[int, str], extra_wrong: Iterable[str] = ()) -> Verdict:
    """Every window of every epoch up to the last one must be there once, with the text and tokens that it has.

    Args:
        entries: the whole ledger; its last epoch is complete.
        expected: digest of every window of the split.
        extra_wrong: what was found wrong by other means.
    """
    counts = Counter((entry.epoch, entry.index) for entry in entries)
    num_epochs = max((entry.epoch for entry in entries), default=-1) + 1
    due = {(epoch, index) for epoch in range(num_epochs) for index in expected}
    wrong = [f"epoch {entry.epoch}, window {entry.index}: {entry.wrong}" for entry in entries if entry.wrong]
    wrong += [
        f"epoch {entry.epoch}, window {entry.index}: other text or tokens than the window has"
        for entry in entries
        if expected.get(entry.index) != entry.digest
    ]
    return Verdict(
        delivered=len(entries),
        lost=sorted(due - counts.keys()),
        twice=sorted(window for window, count in counts.items() if count > 1),
        wrong=[*wrong, *extra_wrong],
    )


def digest_of(text: bytes, token_ids: npt.NDArray[np.int32]) -> str:
    return hashlib.sha256(text + b"\0" + token_ids.astype("<i4").tobytes()).hexdigest()[:16]
