"""A document: the unit that is split, deduplicated and cut into windows."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.wire.messages import Messages


@dataclass(frozen=True, slots=True)
class Document:
    """A whole document; `name` is unique in the corpus."""

    name: str
    text: bytes


@dataclass(frozen=True, slots=True)
class Conversation(Document):
    """A conversation as a document; its text is the contents of all messages, a line end between two."""

    conversation: Messages = field(default_factory=Messages)

    @classmethod
    def of(cls, name: str, conversation: Messages) -> Conversation:
        """Return the document of a conversation."""
        contents = [message.get("content") or "" for message in conversation.messages]
        return cls(name, "\n".join(contents).encode(), conversation)
