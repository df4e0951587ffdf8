"""Calls of tools by an answer, and the tool that runs Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.wire.messages import Message

PYTHON = "python"
"""Name of the tool that runs a program; its one argument is `code`. An interpreter's call becomes a call of it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: of the tool; not checked against those that were offered.
        arguments: by name, as in JSON.
        id: 9 letters and digits, which the tool's message names; empty until the answer is sent.
    """

    name: str
    arguments: dict[str, Any]
    id: str = ""

    def as_message_part(self) -> dict[str, Any]:
        """Return the call as an entry of `tool_calls` in an assistant's message."""
        return {"type": "function", "id": self.id, "function": {"name": self.name, "arguments": self.arguments}}

    def answered(self, result: str) -> Message:
        """Return the message with the tool's result."""
        return {"role": "tool", "name": self.name, "tool_call_id": self.id, "content": result}
