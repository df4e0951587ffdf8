"""Rows of a file of answers, as `fusion sample --to` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.reward.pairs import messages_of
from services.wire.messages import Message


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


def asked_of(row: dict[str, Any], where: str) -> list[Message]:
    """Return the messages that a row's answer replies to; ValueError naming the row and the key that is wrong."""
    messages = row.get("messages")
    if "prompt" not in row and not isinstance(row.get("completion"), str) and isinstance(messages, list):
        row = {"messages": messages[:-1]}
    try:
        return messages_of(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def answer_of(row: dict[str, Any], where: str) -> str:
    """Return the answer of a row: its completion, or the last message."""
    if isinstance(completion := row.get("completion"), str):
        return completion
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(content := last.get("content"), str):
        return content
    raise ValueError(f"{where}: no answer; expected `completion`, or `messages` that end with the assistant's")
