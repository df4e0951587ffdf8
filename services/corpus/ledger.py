"""A corpus: documents split once into train and held-out windows, kept in a ledger that every part reads.

On disk: `windows.parquet`, one row per window in the order of the documents, and `corpus.json` with counts, origin,
fingerprints and the tokenizers that the windows were planned for. The windows of a document follow each other and
together are the document, byte for byte, but for white space that would fill windows of its own (and the last document
under a cap may end early). Preparing holds the text of the corpus in memory once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.models.packages import file_sha256
from services.wire.passage import Passage

TRAIN, HELD_OUT = "train", "held_out"
WINDOWS, RECORD = "windows.parquet", "corpus.json"
VERSION = 2
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("document", pa.string()),
        ("start_byte", pa.int64()),
        ("text", pa.binary()),
        ("sha256", pa.string()),
        ("context_start", pa.int64()),
        ("ends_document", pa.bool_()),
    ]
)
TURN_SCHEMA = SCHEMA.append(pa.field("messages", pa.binary())).append(pa.field("turn", pa.int64()))
"""Schema of a corpus of conversations: the messages before a turn, and its number in the conversation."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window: its bytes, its document, the place in it, and the index in the split.

    `context` is the text right before it that sources read with it; `ends_document` whether the document ends with it.
    """

    text: bytes
    document: str
    start_byte: int
    index: int
    context: bytes
    ends_document: bool
    messages: bytes = b""
    turn: int = 0

    @property
    def passage(self) -> Passage:
        """The text with its context, as sources score it and as its scores are stored."""
        return Passage(self.text, self.context, self.ends_document, self.messages)


class Corpus:
    """The ledger of a prepared corpus, held in memory."""

    def __init__(self, folder: Path, record: dict[str, Any], table: pa.Table) -> None:
        self.folder, self.record = folder, record
        self._splits = {
            split: table.slice(info["first_row"], info["num_windows"]) for split, info in record["splits"].items()
        }

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Open what `prepare.plan_corpus` wrote; ValueError when it is missing or damaged."""
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text())
            intact = record["version"] == VERSION and record["windows_sha256"] == file_sha256(folder / WINDOWS)
        except FileNotFoundError as error:
            raise ValueError(f"corpus: {error.filename} does not exist; prepare the corpus first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"corpus: {folder / RECORD} is damaged: {error}") from error
        if not intact:
            raise ValueError(f"corpus: {folder / WINDOWS} is not the file that {RECORD} describes; prepare it again")
        return cls(folder, record, pq.read_table(folder / WINDOWS))

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def num_windows(self, split: str) -> int:
        return int(self._info(split)["num_windows"])

    def num_bytes(self, split: str) -> int:
        return int(self._info(split)["num_bytes"])

    def fingerprint(self, split: str) -> str:
        """Return the hash over the windows of the split: equal for the same text in the same windows."""
        return str(self._info(split)["fingerprint"])

    def window(self, split: str, index: int) -> Window:
        """Return the window at `index`, from 0 to `num_windows(split) - 1`; IndexError outside of it."""
        if not 0 <= index < self.num_windows(split):
            raise IndexError(f"window {index} of {self.num_windows(split)} in split {split!r}")
        columns = ["text", "document", "start_byte", "ends_document"]
        if "messages" in self._splits[split].column_names:
            columns += ["messages", "turn"]
        row = {name: self._cell(split, name, index) for name in columns}
        context_start, at, context = self._cell(split, "context_start", index), index, b""
        while len(context) < row["start_byte"] - context_start:
            at -= 1  # the windows before it are of the same document
            context = self._cell(split, "text", at) + context
        context = context[len(context) - (row["start_byte"] - context_start) :]
        return Window(**row, index=index, context=context)

    def texts(self, split: str) -> Iterator[bytes]:
        """Yield the windows' bytes in order."""
        self._info(split)
        for value in self._splits[split].column("text"):
            yield value.as_py()

    def _cell(self, split: str, column: str, index: int) -> Any:
        return self._splits[split].column(column)[index].as_py()

    def _info(self, split: str) -> dict[str, Any]:
        if split not in self._splits:
            raise ValueError(f"split: corpus {self.name!r} has no {split!r}, only {', '.join(self._splits)}")
        info: dict[str, Any] = self.record["splits"][split]
        return info
