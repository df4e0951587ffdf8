"""Rows of a file of answers, as `fusion sample --to` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file, each with its place for messages; raises ValueError for a line that is no object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object")
            yield where, row


def answer_of(row: dict[str, Any], where: str) -> str:
    """Return the answer of a row: its completion, or the last message."""
    if isinstance(completion := row.get("completion"), str):
        return completion
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(content := last.get("content"), str):
        return content
    raise ValueError(f"{where}: no answer; expected `completion`, or `messages` that end with the assistant's")
