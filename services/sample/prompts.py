"""Read prompts from files: rows with `prompt`, a text to be continued, or `messages`, a conversation to reply to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.base.errors import SettingError
from services.corpus.readers import local_files
from services.wire.answer import AnswerPrompt, messages_prompt, text_prompt
from services.wire.messages import check_messages, check_tools

_KEYS = ("prompt", "messages")


def read_prompts(patterns: Sequence[str]) -> Iterator[AnswerPrompt]:
    """Yield the prompts of all files, in order; raises SettingError naming file, row and key of one that is none."""
    try:
        files = local_files(patterns)
    except SettingError as error:
        raise SettingError("prompts", error.problem) from error
    for path in files:
        rows = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
        if rows is None:
            raise SettingError("prompts", f"{path} is neither .jsonl nor .parquet")
        for number, row in enumerate(rows(path), 1):
            yield _prompt(row, f"{path}, row {number}")


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise SettingError("prompts", f"{path}, line {number}: no JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in (*_KEYS, "tools") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield {key: value for key, value in row.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise SettingError("prompts", f"{path}: cannot be read: {error}") from error


def _prompt(row: Any, where: str) -> AnswerPrompt:
    given = [key for key in _KEYS if isinstance(row, Mapping) and key in row]
    if len(given) != 1:
        raise SettingError("prompts", f"{where}: needs one of the keys {' and '.join(_KEYS)}")
    value = row[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str):
            raise SettingError("prompts", f"{where}: prompt must be a string")
        return text_prompt(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise SettingError("prompts", f"{where}: messages must be a list of at least one object")
    messages = [
        {key: part for key, part in message.items() if part is not None or key == "content"} for message in value
    ]
    try:
        check_messages(messages)
        if (tools := row.get("tools")) is not None:
            check_tools(tools)
    except ValueError as error:
        raise SettingError("prompts", f"{where}: {error}") from error
    if messages[-1].get("role") == "assistant":
        raise SettingError("prompts", f"{where}: messages end with the assistant's; leave out what is to be answered")
    return messages_prompt(messages, tools)
