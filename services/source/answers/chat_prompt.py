"""Prompts of messages for one model, and the tokens that end its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion_core.vocabulary import Vocabulary
from services.base.errors import InvalidArgumentError
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer
from services.wire.messages import read_messages


class ChatPrompts:
    """Writes messages as prompts: with the source's `chat_template`, or else with the model's own.

    Attributes:
        vocabulary: the bytes of an answer's tokens; control tokens have none.
        template_hash: 16 hexadecimal digits of the template; empty when there is none.
        stop_ids: ids that end an answer: EOS by the source's, the tokenizer's and the model's own account, and the
            token that the template writes behind an assistant's turn.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, chat: ChatTokenizer | None = None) -> None:
        self._missing = "the model has no chat template of its own; set the source's chat_template"
        if chat is None and _has_template(folder):
            try:
                chat = ChatTokenizer.from_pretrained(folder)
            except ValueError as error:
                self._missing = str(error)
        self._chat = chat
        self.vocabulary = chat.vocabulary if chat else vocabulary
        self.template_hash = chat.template.hash if chat else ""
        ids = {vocabulary.eos_id, self.vocabulary.eos_id, *_declared_ends(folder, vocabulary)}
        self.stop_ids = tuple(sorted(i for i in ids if i is not None and 0 <= i < vocabulary.size))

    def token_ids(self, messages: bytes, field: str) -> list[int]:
        """Return the ids of a conversation, JSON, up to where the assistant's answer begins.

        Raises InvalidArgumentError naming the `field`: what is wrong with the messages, or that there is no template.
        """
        if self._chat is None:
            raise InvalidArgumentError(f"{field}: {self._missing}, or send text")
        try:
            parsed = read_messages(messages)
            if not parsed.messages:
                raise ValueError("messages: expected at least one")
            ids: list[int] = self._chat.encode_messages(parsed).tolist()
        except (ValueError, TurnRefusedError) as error:
            raise InvalidArgumentError(f"{field}: {error}") from error
        return ids


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
