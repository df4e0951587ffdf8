"""Read conversations: `messages`, or `prompt` and `completion`, from .jsonl and .parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from services.base.errors import SettingError
from services.corpus.document import Conversation, domain_of
from services.wire.messages import Message, Messages, check_messages, check_tools

_SUFFIXES = (".jsonl", ".parquet")
_KEYS = ("messages", "tools", "prompt", "completion")


def conversations(path: Path, name: str, domain_field: str | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a file; ValueError names the file, the line or row, and the key that is wrong."""
    for number, where, row in records(path, name, [*_KEYS, *([domain_field] if domain_field else [])]):
        try:
            conversation, domain = conversation_of(row), domain_of(row, domain_field)
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from error
        yield Conversation.of(f"{name}#{number}", conversation, domain)


def records(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[int, str, Any]]:
    """Yield number, place for messages, and values of each record of a file; of Parquet's columns only those named.

    Raises SettingError for a file of another kind, ValueError for a line that is no JSON.
    """
    if path.suffix == ".jsonl":
        yield from _lines(path)
    elif path.suffix == ".parquet":
        yield from _rows(path, columns)
    else:
        raise SettingError("files", f"{name} is none of {', '.join(_SUFFIXES)}, from which records are read")


def conversation_of(row: Any) -> Messages:
    """Return the conversation in an object with `messages`, or with `prompt` and `completion`; raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("expected an object with messages, or with prompt and completion")
    if row.get("messages") is not None:
        messages = row["messages"]
        check_messages(messages)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        messages = [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")]
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise ValueError(f"expected the key messages, or prompt and completion; its keys: {keys}")
    tools = row.get("tools")
    if tools is not None:
        check_tools(tools)
    return Messages(messages, tools or None)


def _side(row: dict[str, Any], key: str, role: str) -> list[Message]:
    """Return the messages of one side of a pair: a list of messages, or one message as a string."""
    messages = row[key]
    if isinstance(messages, str):
        messages = [{"role": role, "content": messages}]
    try:
        check_messages(messages)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    found: list[Message] = messages
    return found


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield index, f"line {index + 1}", json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {index + 1}: invalid UTF-8 at byte {error.start}") from error
            except ValueError as error:
                raise ValueError(f"{path}, line {index + 1}: not JSON: {error}") from error


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    index = 0
    for batch in file.iter_batches(columns=[key for key in columns if key in file.schema_arrow.names]):
        for row in batch.to_pylist():
            yield index, f"row {index}", _without_missing(row)
            index += 1


def _without_missing(value: Any) -> Any:
    """Return a row without the nulls that Parquet puts where an object lacks a key that others have."""
    if isinstance(value, list):
        return [_without_missing(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_missing(item) for k, item in value.items() if item is not None or k == "content"}
    return value
