"""Prompts of messages for one model, the tokens that end its answers, and the calls of tools in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusion_core.vocabulary import Vocabulary
from services.base.errors import InvalidArgumentError
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer
from services.models.tool_calls import ReadAnswer, Segment, ToolFormat, format_of, marks_of, read_answer
from services.wire.messages import TOOL_ROLES, Messages, check_calls, read_messages

_TOOL_ENDS = ("<|eom_id|>",)
"""Control tokens that end an answer which calls a tool, where they are not declared: Llama 3.1's."""
_PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation in tokens, up to where the answer begins, and whether it names tools."""

    token_ids: list[int]
    has_tools: bool


class ChatPrompts:
    """Writes messages as prompts: with the source's `chat_template`, or else with the model's own.

    Attributes:
        vocabulary: the bytes of an answer's tokens; control tokens have none.
        template_hash: 16 hexadecimal digits of the template; empty when there is none.
        stop_ids: ids that end an answer: EOS by the source's, the tokenizer's and the model's own account, and the
            token that the template writes behind an assistant's turn.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        chat: ChatTokenizer | None = None,
        *,
        source: str = "",
        tool_format: ToolFormat | None = None,
    ) -> None:
        """Read the folder's template unless there is a `chat`.

        Args:
            folder: the model's.
            vocabulary: of the source.
            chat: writes conversations, with the source's `chat_template`.
            source: its name, for messages.
            tool_format: of the calls in answers; by default the template's.
        """
        self._source, self._set_format = source, tool_format
        self._missing = "the model has no chat template of its own; set the source's chat_template"
        if chat is None and _has_template(folder):
            try:
                chat = ChatTokenizer.from_pretrained(folder)
            except ValueError as error:
                self._missing = str(error)
        self._chat = chat
        self.vocabulary = chat.vocabulary if chat else vocabulary
        self.template_hash = chat.template.hash if chat else ""
        ends = [vocabulary.special_tokens.get(name) for name in _TOOL_ENDS]
        ids = {vocabulary.eos_id, self.vocabulary.eos_id, *ends, *_declared_ends(folder, vocabulary)}
        self.stop_ids = tuple(sorted(i for i in ids if i is not None and 0 <= i < vocabulary.size))

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The format of the calls in answers; None where the template has no place for tools, or calls are not read."""
        if self._chat is None or self._chat.template.find_unwritten([{"role": "user", "content": ""}], [_PROBE]):
            return None
        return self._format

    @cached_property
    def _format(self) -> ToolFormat | None:
        if self._chat is None:
            return None
        return self._set_format or format_of(self._chat.template.text)

    @cached_property
    def _marks(self) -> dict[int, str]:
        """The marks of calls for which the model has tokens."""
        if self._chat is None or self._format is None:
            return {}
        added = self._chat.added_tokens
        return {added[mark]: mark for mark in marks_of(self._format) if mark in added}

    def read_calls(self, token_ids: Iterable[int], num_bytes: int | None = None) -> ReadAnswer:
        """Return words and calls of an answer in tokens, of which the first `num_bytes` bytes count."""
        parts = [("", bytearray())]
        left = num_bytes
        for token_id in token_ids:
            if left == 0:
                break
            data = self.vocabulary.token_bytes(token_id)[:left]
            left = None if left is None else left - len(data)
            if (mark := self._marks.get(token_id)) is not None:
                parts.append((mark, bytearray()))
            else:
                parts[-1][1].extend(data)
        segments = [Segment(mark, bytes(data).decode("utf-8", errors="replace")) for mark, data in parts]
        if self._format is None:
            return ReadAnswer("".join(segment.text for segment in segments))
        text_marks = [mark for mark in marks_of(self._format) if mark not in self._marks.values()]
        return read_answer(self._format, segments, text_marks=text_marks)

    def encode(self, messages: bytes, field: str) -> ChatPrompt:
        """Return a conversation, JSON, up to where the assistant's answer begins.

        Raises InvalidArgumentError naming the `field`: what is wrong with the messages, that there is no template, or
        what the template leaves out of tools, calls and results.
        """
        if self._chat is None:
            raise InvalidArgumentError(f"{field}: {self._missing}, or send text")
        try:
            parsed = read_messages(messages)
            if not parsed.messages:
                raise ValueError("messages: expected at least one")
            check_calls(parsed)
            self._check_places(parsed)
            ids: list[int] = self._chat.encode_messages(parsed).tolist()
        except (ValueError, TurnRefusedError) as error:
            raise InvalidArgumentError(f"{field}: {error}") from error
        return ChatPrompt(ids, has_tools=bool(parsed.tools))

    def token_ids(self, messages: bytes, field: str) -> list[int]:
        """Return the ids of `encode`."""
        return self.encode(messages, field).token_ids

    def _check_places(self, given: Messages) -> None:
        """Raise ValueError naming what the template leaves out."""
        assert self._chat is not None
        if not given.tools and not any(m.get("tool_calls") or m["role"] in TOOL_ROLES for m in given.messages):
            return
        if missing := self._chat.template.find_unwritten(given.messages, given.tools):
            raise ValueError(
                f"{missing}: the chat template of source {self._source} has no place for it; allowed are system, user "
                "and assistant messages without tools, or set the source's chat_template to one that writes tools"
            )


def _has_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template: a base model's tokenizer need not be loaded once more."""
    own_file = any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return own_file or bool(_values(folder / "tokenizer_config.json").get("chat_template"))


def _declared_ends(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """Return the ids that the model's own files call EOS."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _values(folder / name).get("eos_token_id")
        found += [value] if isinstance(value, int) else value if isinstance(value, list) else []
    token = _values(folder / "tokenizer_config.json").get("eos_token")
    eos = token.get("content") if isinstance(token, dict) else token
    return [*found, vocabulary.special_tokens.get(str(eos), -1)]


def _values(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
