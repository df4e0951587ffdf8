"""Chat templates: conversations as a model writes them, and the place of an assistant's words in the text.

Templates are Jinja programs that come with models. transformers renders them, in its sandbox, so that a conversation is
written here as `apply_chat_template` writes it; only the date that some templates show is fixed, so that a conversation
is written the same every day.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from services.base.home import expand_user
from services.wire.messages import TOOL_ROLES, Message

MODEL, PLAIN = "model", "plain"
BUILT_IN = {PLAIN: "plain.jinja", "internlm2": "internlm2/tools.jinja"}
"""The templates of this package and their files; `internlm2` has InternLM2's plug-ins and interpreter."""
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
        self._knows_tool_role = re.search(r"""['"]tool['"]""", self._text_with_tools) is not None
        self._slot = str(secrets.randbits(128))

    @classmethod
    def of(cls, tokenizer: Any, chosen: str = MODEL) -> ChatTemplate:
        """Return a template for the model of a transformers tokenizer.

        Args:
            tokenizer: names the special tokens, and has the model's own template.
            chosen: `model` for the model's own, a name of `BUILT_IN`, or the text of a template.

        Raises ValueError when the model has no template of its own.
        """
        names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        own: Any = tokenizer.chat_template
        if chosen in BUILT_IN:
            return cls(cls.built_in(chosen), names)
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
        return ChatTemplate.built_in(PLAIN)

    @staticmethod
    def built_in(name: str) -> str:
        """Return the text of one of the templates in `BUILT_IN`."""
        return (resources.files("services.models") / BUILT_IN[name]).read_text(encoding="utf-8")

    @property
    def text(self) -> str:
        """The template that writes conversations with tools, in Jinja."""
        return self._text_with_tools

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the conversation as text, special tokens by their names; raises TurnRefusedError with the reason.

        For templates that cannot write null, a content of null is written as an empty one; for those that put the
        arguments of a call into the text as they are, arguments that are an object are written as JSON.
        """
        refused: TurnRefusedError | None = None
        for form in self._forms(messages):
            try:
                return self._render(form, tools, add_generation_prompt)
            except TurnRefusedError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def find_unwritten(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        """Return the first tool, call or result of a tool that the template leaves out, as `tools[0]`; None for none.

        Names and results are replaced by random numbers, which have to be in the text.
        """
        slots: dict[str, str] = {}

        def slot(field: str) -> str:
            name = f"s{self._slot}n{len(slots)}e"
            slots[name] = field
            return name

        def renamed(value: dict[str, Any], field: str) -> dict[str, Any]:
            return {**value, "function": {**value["function"], "name": slot(field)}}

        marked_tools = [renamed(tool, f"tools[{n}]") for n, tool in enumerate(tools or ())]
        marked = []
        for index, message in enumerate(messages):
            changed: Message = {}
            if calls := message.get("tool_calls"):
                field = f"messages[{index}].tool_calls"
                changed["tool_calls"] = [renamed(call, f"{field}[{number}]") for number, call in enumerate(calls)]
            if message["role"] in TOOL_ROLES:
                changed["content"] = slot(f"messages[{index}].content")
            marked.append(message | changed)
        try:
            text = self.render(marked, marked_tools or None, add_generation_prompt=True)
        except TurnRefusedError:
            return None  # so does the conversation itself, which gives the reason
        return next((field for name, field in slots.items() if name not in text), None)

    def _forms(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """Yield the messages in the forms to be tried, the given one first."""
        given = [self._with_known_role(message) for message in messages]
        filled = [{**message, "content": message.get("content") or ""} for message in given]
        if not self._knows_calls:
            yield filled
            return
        for form in (given, filled) if any(message.get("content") is None for message in given) else (given,):
            yield form
            if any(map(_has_object_arguments, form)):
                yield list(map(_with_written_arguments, form))

    def _with_known_role(self, message: Message) -> Message:
        """Return the message with role `tool` for `environment` where the template asks for `tool`."""
        if message["role"] == "environment" and self._knows_tool_role:
            return {**message, "role": "tool"}
        return message

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
    if value is None or value in {MODEL, *BUILT_IN} or "{" in value:
        return value
    try:
        text = expand_user(value, "chat_template").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join((MODEL, *BUILT_IN))
        raise ValueError(f"allowed are {names}, a file or the text of a template; {error}") from error
    if "{" not in text:
        raise ValueError(f"{value} holds no Jinja template")
    return text


def _has_object_arguments(message: Message) -> bool:
    calls = message.get("tool_calls") or ()
    return any(isinstance((call.get("function") or {}).get("arguments"), dict) for call in calls)


def _with_written_arguments(message: Message) -> Message:
    if not _has_object_arguments(message):
        return message
    return {**message, "tool_calls": list(map(_with_written, message["tool_calls"]))}


def _with_written(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    if not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _fixed_date(form: str) -> str:
    return _DATE.strftime(form)
