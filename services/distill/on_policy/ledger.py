"""The ledger of a round: the target's answers, in the order in which steps take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.base.atomic import drop_partial, whole_folder
from services.base.errors import FailedPreconditionError
from services.wire.passage import Passage

RECORD = "round.json"
_ROWS_PER_SHARD = 4096
_SCHEMA = pa.schema(
    [
        pa.field("draw", pa.int64(), nullable=False),  # of the prompt, counted over the run
        pa.field("number", pa.int32(), nullable=False),  # of the answer to the prompt
        pa.field("prompt", pa.binary(), nullable=False),  # text, or messages as JSON
        pa.field("is_messages", pa.bool_(), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
        pa.field("ends", pa.bool_(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ],
    metadata={"format": "llm-fusion round 1"},
)


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """An answer of the target.

    Attributes:
        draw: number of the prompt among all that the run draws.
        number: number of the answer to this prompt.
        prompt: UTF-8: the text that is continued, or the messages before the answer as JSON.
        is_messages: whether the prompt is messages.
        text: UTF-8, not empty.
        ends: whether the target ended it; otherwise it is cut off at the longest answer allowed.
        num_tokens: sampled tokens, the one that ends it included.
    """

    draw: int
    number: int
    prompt: bytes
    is_messages: bool
    text: bytes
    ends: bool
    num_tokens: int

    @property
    def passage(self) -> Passage:
        """The answer as sources score it, behind its prompt."""
        if self.is_messages:
            return Passage(self.text, ends_document=self.ends, messages=self.prompt)
        return Passage(self.text, self.prompt, self.ends)


class RoundLedger:
    """The answers of a round.

    Attributes:
        name: of the round's folder: its number, and the hash of the weights that answered.
        answers: in their order.
    """

    def __init__(self, folder: Path, answers: Sequence[OwnAnswer]) -> None:
        self.name, self.answers = folder.name, answers

    @classmethod
    def open(cls, folder: Path) -> RoundLedger | None:
        """Return the ledger in a folder, None where there is none; FailedPreconditionError when it is damaged."""
        if not (folder / RECORD).exists():
            return None
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            tables = [pq.read_table(folder / name, page_checksum_verification=True) for name in record["shards"]]
            answers = [OwnAnswer(**row) for table in tables for row in table.to_pylist()]
            if len(answers) != record["answers"]:
                raise ValueError(f"{len(answers)} answers, not {record['answers']}")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise FailedPreconditionError(
                f"round: {folder} is damaged: {error}; delete the folder, and start the run over"
            ) from error
        return cls(folder, answers)

    @classmethod
    def write(cls, folder: Path, answers: Sequence[OwnAnswer], details: dict[str, Any]) -> RoundLedger:
        """Write a ledger into `folder`, which appears whole; `details` go into its record."""
        drop_partial(folder)  # of a worker that was killed: the run's lease is this one's
        shards = range(0, len(answers), _ROWS_PER_SHARD)
        names = [f"answers-{number:05d}.parquet" for number in range(len(shards))]
        with whole_folder(folder, replace=True) as made:
            for name, start in zip(names, shards, strict=True):
                rows = [asdict(answer) for answer in answers[start : start + _ROWS_PER_SHARD]]
                table = pa.Table.from_pylist(rows, schema=_SCHEMA)
                pq.write_table(table, made / name, compression="zstd", write_page_checksum=True)
            record = {**details, "answers": len(answers), "shards": names}
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return cls(folder, answers)
