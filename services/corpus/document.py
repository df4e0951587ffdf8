"""A document: the unit that is split, deduplicated and cut into windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.wire.messages import Messages


@dataclass(frozen=True, slots=True)
class Document:
    """A whole document; `name` is unique in the corpus, `domain` empty where the files do not name it."""

    name: str
    text: bytes
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Conversation(Document):
    """A conversation as a document; its text is the contents of all messages, a line end between two."""

    conversation: Messages = field(default_factory=Messages)

    @classmethod
    def of(cls, name: str, conversation: Messages, domain: str = "") -> Conversation:
        """Return the document of a conversation."""
        contents = [message.get("content") or "" for message in conversation.messages]
        return cls(name, "\n".join(contents).encode(), domain, conversation)


def domain_of(row: Mapping[str, Any], field_name: str | None) -> str:
    """Return the domain in a record, empty where it has none; ValueError for one that is no text or number."""
    value = row.get(field_name) if field_name is not None else None
    if isinstance(value, list | dict):
        raise ValueError(f"domain_field: expected text or a number under {field_name!r}, got {value!r:.80}")
    return "" if value is None else str(value)
