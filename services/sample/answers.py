"""A store of answers: rows of Parquet files by a key that is made of all that decides an answer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.v1 import source_pb2
from services.base.files import Files
from services.store.identity import ModelIdentity
from services.store.index import KeyIndex
from services.wire.answer import Answer, AnswerPrompt, Sampling
from services.wire.messages import read_messages

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_OPEN_FILES = 4
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("prompt", pa.binary(), nullable=False),  # text, or messages as JSON
        pa.field("is_messages", pa.bool_(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),  # JSON
    ],
    metadata={"format": "llm-fusion answers 1"},
)
Row = dict[str, Any]


class AnswerIdentity(ModelIdentity):
    """The properties that decide a source's answers; its template is the one that writes messages as prompts."""

    @classmethod
    def of(cls, info: source_pb2.GetSourceInfoResponse) -> Self:
        return cls.described(info, chat_template=info.answer_template)


def deciding(sampling: Sampling) -> str:
    """Return the settings that decide an answer, as JSON: those of how many are asked for do not."""
    values = sampling.model_dump(exclude={"num_answers", "first_answer", "logprobs"})
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def answer_key(prompt: AnswerPrompt, sampling: Sampling, number: int) -> bytes:
    """Return the content address of an answer below its source."""
    parts = prompt.identity + number.to_bytes(4, "little") + deciding(sampling).encode()
    return hashlib.sha256(parts).digest()[:KEY_BYTES]


class AnswerStore:
    """The answers of one source below `answers/` of a folder or URL; one process writes, several may.

    A file that cannot be read counts as absent: its answers are asked for again.
    """

    def __init__(self, files: Files, identity: AnswerIdentity, *, answers_per_shard: int) -> None:
        self._files = files
        self._folder = f"answers/{identity.digest}"
        self._identity = identity
        self._answers_per_shard = answers_per_shard
        self._index = KeyIndex()
        self._names: list[str] = []
        self._pending: dict[bytes, Row] = {}
        self._open: OrderedDict[int, pa.Table] = OrderedDict()
        for name in sorted(files.sizes(self._folder)):
            if name.endswith(".parquet"):
                self._read_keys(name)

    def _read_keys(self, name: str) -> None:
        path = f"{self._folder}/{name}"
        try:
            with self._files.open(path) as stream:
                keys = pq.read_table(stream, columns=["key"], page_checksum_verification=True).column("key").to_pylist()
        except _UNREADABLE as error:
            logger.warning("sample.store: %s cannot be read, and is left alone: %s", self._files.location(path), error)
            return
        self._add(name, keys)

    def _add(self, name: str, keys: Sequence[bytes]) -> None:
        self._index.add(len(self._names), keys)
        self._names.append(name)

    def missing(self, prompt: AnswerPrompt, sampling: Sampling) -> range:
        """Return the numbers from the first to the last answer of those asked for that are not there."""
        absent = [n for n in sampling.numbers if not self._has(answer_key(prompt, sampling, n))]
        return range(absent[0], absent[-1] + 1) if absent else range(0)

    def _has(self, key: bytes) -> bool:
        return key in self._pending or bool(self._index.find(key))

    def put(self, prompt: AnswerPrompt, sampling: Sampling, answers: Iterable[Answer]) -> None:
        """Store the answers to a prompt; they are written when a file is full, and at `flush`."""
        for answer in answers:
            assert answer.logprobs_T is not None, "log-probabilities are kept"
            key = answer_key(prompt, sampling, answer.number)
            if self._has(key):
                continue
            self._pending[key] = {
                "key": key,
                "prompt": prompt.content,
                "is_messages": prompt.is_messages,
                "number": answer.number,
                "text": answer.text,
                "token_ids": answer.token_ids_T,
                "logprobs": answer.logprobs_T,
                "finish_reason": answer.finish_reason,
                "seed": answer.seed,
                "num_prompt_tokens": answer.num_prompt_tokens,
                "sampling": deciding(sampling),
            }
        if len(self._pending) >= self._answers_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is only in memory; OSError when there is no room."""
        if not self._pending:
            return
        source = f"{self._folder}/source.json"
        if self._files.read(source) is None:
            self._files.write(source, self._identity.model_dump_json(indent=2).encode() + b"\n")
        rows = [self._pending[key] for key in sorted(self._pending)]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True, store_schema=True)
        data = sink.getvalue().to_pybytes()
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
        self._files.write(f"{self._folder}/{name}", data)
        self._add(name, [row["key"] for row in rows])
        self._pending.clear()

    def find(self, prompt: AnswerPrompt, sampling: Sampling, number: int) -> Row | None:
        """Return an answer that was written, by column; None when it is not there."""
        key = answer_key(prompt, sampling, number)
        for shard, row in self._index.find(key):
            table = self._table(shard)
            if table is not None and table.column("key")[row].as_py() == key:
                found: Row = table.slice(row, 1).to_pylist()[0]
                return found
        return None

    def _table(self, shard: int) -> pa.Table | None:
        if shard not in self._open:
            path = f"{self._folder}/{self._names[shard]}"
            try:
                with self._files.open(path) as stream:
                    self._open[shard] = pq.read_table(stream, page_checksum_verification=True)
            except _UNREADABLE as error:
                logger.warning("sample.store: %s cannot be read: %s", self._files.location(path), error)
                return None
        self._open.move_to_end(shard)
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[shard]


def conversation(row: Row, source: str) -> dict[str, Any]:
    """Return an answer as a row of training data: the whole conversation, or prompt and completion.

    Bytes that are no UTF-8 (an answer cut inside a character) become U+FFFD.
    """
    text = row["text"].decode("utf-8", errors="replace")
    values: dict[str, Any]
    if row["is_messages"]:
        given = read_messages(row["prompt"])
        values = {"messages": [*given.messages, {"role": "assistant", "content": text}]}
        if given.tools:
            values["tools"] = given.tools
    else:
        values = {"prompt": row["prompt"].decode(), "completion": text}
    logprob = float(np.sum(row["logprobs"], dtype=np.float64))
    about = {"source": source, "answer": row["number"], "finish_reason": row["finish_reason"], "seed": row["seed"]}
    return values | about | {"num_tokens": len(row["token_ids"]), "logprob": round(logprob, 4)}
