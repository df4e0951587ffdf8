"""Chat templates: conversations as a model writes them, and the place of an assistant's words in the text.

Templates are Jinja programs that come with models. transformers renders them, in its sandbox, so that a conversation is
written here as `apply_chat_template` writes it; only the date that some templates show is fixed, so that a conversation
is written the same every day.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from services.base.home import expand_user
from services.wire.messages import Message

MODEL, PLAIN = "model", "plain"
_DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that templates show: the one that Llama's use when no date is given."""


class TurnRefusedError(ValueError):
    """A conversation that a template refuses, or an assistant's turn whose words it changes."""


@dataclass(frozen=True, slots=True)
class WrittenTurn:
    """An assistant's turn as a template writes it: `before`, then `content[start:end]`, then `after`.

    Templates may leave out white space at the ends of a content; nothing else is missing from the middle part.
    """

    before: str
    start: int
    end: int
    after: str


class ChatTemplate:
    """A template with the special tokens that it names.

    Attributes:
        hash: 16 hexadecimal digits that differ when the template's text does.
    """

    def __init__(self, text: str, names: dict[str, Any], text_with_tools: str | None = None) -> None:
        """Take special tokens by role, such as bos_token; `text_with_tools` is a model's second template."""
        self._text, self._text_with_tools, self._names = text, text_with_tools or text, names
        texts = text if text_with_tools is None else f"{text}\0{text_with_tools}"
        self.hash = hashlib.sha256(texts.encode()).hexdigest()[:16]
        self._knows_calls = "tool_calls" in self._text_with_tools
        self._slot = str(secrets.randbits(128))

    @classmethod
    def of(cls, tokenizer: Any, chosen: str = MODEL) -> ChatTemplate:
        """Return a template for the model of a transformers tokenizer.

        Args:
            tokenizer: names the special tokens, and has the model's own template.
            chosen: `model` for the model's own, `plain` for the one of this package, or the text of a template.

        Raises ValueError when the model has no template of its own.
        """
        names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        own: Any = tokenizer.chat_template
        if chosen == PLAIN:
            return cls(cls.plain_text(), names)
        if chosen != MODEL:
            return cls(chosen, names)
        by_name: dict[str, str] = own if isinstance(own, dict) else {"default": own}
        if not by_name.get("default"):
            raise ValueError(
                "the model has no chat template of its own; set `plain` (User:, Assistant: and blank lines), or a file "
                "with a Jinja template"
            )
        return cls(by_name["default"], names, by_name.get("tool_use"))

    @staticmethod
    def plain_text() -> str:
        """Return the text of the plain template."""
        return (resources.files("services.models") / "plain.jinja").read_text(encoding="utf-8")

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the conversation as text, special tokens by their names; raises TurnRefusedError with the reason.

        For templates that cannot write null, a content of null is written as an empty one.
        """
        given = list(messages)
        filled = [{**message, "content": message.get("content") or ""} for message in given]
        if not self._knows_calls:
            return self._render(filled, tools, add_generation_prompt)
        try:
            return self._render(given, tools, add_generation_prompt)
        except TurnRefusedError:
            if all(message.get("content") is not None for message in given):
                raise
        return self._render(filled, tools, add_generation_prompt)

    def write_turn(self, messages: Sequence[Message], content: str, tools: list[Any] | None = None) -> WrittenTurn:
        """Return the turn that says `content` behind `messages`.

        A random number, written in place of the content, shows where the content stands.

        Raises TurnRefusedError when the template refuses the conversation, or writes the content otherwise.
        """
        empty = self.render([*messages, {"role": "assistant", "content": self._slot}], tools)
        before, *others = empty.split(self._slot)
        if len(others) != 1:
            raise TurnRefusedError(f"the chat template writes the assistant's words {len(others)} times, not once")
        [after] = others
        written = self.render([*messages, {"role": "assistant", "content": content}], tools)
        body = written.removesuffix(after)
        if body.startswith(before) and len(body) + len(after) == len(written):
            kept = body[len(before) :]
            start = _indent(content) - _indent(kept)
            if kept.strip() == content.strip() and start >= 0 and content[start : start + len(kept)] == kept:
                return WrittenTurn(before, start, start + len(kept), after)
        # Templates of reasoning models put their marks in front of words that have none.
        shorter = body.removesuffix(content)
        if len(shorter) + len(content) + len(after) == len(written) and before.startswith(shorter):
            return WrittenTurn(shorter, 0, len(content), after)
        raise TurnRefusedError("the chat template writes the assistant's words otherwise than they are")

    def _render(self, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(  # its annotation says that it returns a string
                [messages],
                tools=tools,
                chat_template=self._text if tools is None else self._text_with_tools,
                add_generation_prompt=add_generation_prompt,
                **{**self._names, "strftime_now": _fixed_date},
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            # A template is a program: a conversation that it cannot write raises any of these.
            raise TurnRefusedError(f"the chat template refuses the conversation: {error}") from error
        return str(rendered[0][0])


def read_chosen(value: str | None) -> str | None:
    """Return a setting with the text in place of a file's name: models run where the file is not.

    Raises ValueError for a file that cannot be read or holds no template.
    """
    if value is None or value in {MODEL, PLAIN} or "{" in value:
        return value
    try:
        text = expand_user(value, "chat_template").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"allowed are {MODEL}, {PLAIN}, a file or the text of a template; {error}") from error
    if "{" not in text:
        raise ValueError(f"{value} holds no Jinja template")
    return text


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _fixed_date(form: str) -> str:
    return _DATE.strftime(form)
