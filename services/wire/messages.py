"""Messages of a conversation on the wire: JSON with role and content of each, and the tools where there are any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""An object with `role` and `content`, and whatever else chat templates read (`tool_calls`, `name`)."""
ROLES = ("system", "user", "assistant", "tool", "environment")
"""The roles of messages; `environment` is InternLM2's word for `tool`."""
TOOL_ROLES = ("tool", "environment")


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages of a conversation in their order, and the JSON schemas of the tools that the assistant may call."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None

    def to_bytes(self) -> bytes:
        """Return the JSON without spaces: a list, or with tools an object. Keys keep the order that templates show."""
        value: Any = self.messages if self.tools is None else {"messages": self.messages, "tools": self.tools}
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def read_messages(data: bytes) -> Messages:
    """Return the messages in the JSON; raises ValueError naming the message that is wrong and what is allowed."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    given: dict[str, Any] = value if isinstance(value, dict) else {"messages": value}
    if unknown := sorted(set(given) - {"messages", "tools"}):
        raise ValueError(f"{unknown[0]!r} is not known; allowed are messages and tools")
    messages, tools = given.get("messages"), given.get("tools")
    check_messages(messages)
    if tools is not None:
        check_tools(tools)
    return Messages(messages or [], tools or None)


def check_messages(value: Any) -> None:
    """Raise ValueError naming the message and key unless the value is a list of messages; it may be empty."""
    if not isinstance(value, list):
        raise ValueError(f"messages: expected a list, got {_kind(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}]: expected an object with role and content, got {_kind(message)}")
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{index}].role: {message.get('role')!r} is none of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise ValueError(f"messages[{index}].tool_calls: expected a list of objects")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(
                f"messages[{index}].content: expected a string, or null beside tool_calls; got {_kind(content)}"
            )
    _check_characters(value)


def check_tools(value: Any) -> None:
    """Raise ValueError unless the value is a list of objects: the tools' JSON schemas."""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools: expected a list of objects")
    _check_characters(value)


def check_calls(given: Messages) -> None:
    """Raise ValueError naming the tool or call that is not as transformers' chat templates take them.

    A tool is {"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}, a call
    {"type": "function", "function": {"name": ..., "arguments": object}}; arguments may be an object as JSON text.
    """
    for index, tool in enumerate(given.tools or ()):
        _named_function(tool, f"tools[{index}]")
    for index, message in enumerate(given.messages):
        calls = message.get("tool_calls") or ()
        if calls and message["role"] != "assistant":
            raise ValueError(f"messages[{index}].tool_calls: only an assistant's message calls tools")
        for number, call in enumerate(calls):
            field = f"messages[{index}].tool_calls[{number}]"
            arguments = _named_function(call, field).get("arguments")
            if not isinstance(arguments, dict | str):
                raise ValueError(f"{field}.function.arguments: expected an object, got {_kind(arguments)}")


def _named_function(value: dict[str, Any], field: str) -> dict[str, Any]:
    function = value.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{field}.function: expected an object with a name")
    return function


def _check_characters(value: Sequence[Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError("a string holds a lone surrogate") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")
