"""Prompts and answers in the tokens of one model: the same for training, for the gate and for rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fusion_core.vocabulary import Vocabulary
from services.base.errors import SettingError
from services.models.chat_template import MODEL, TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer
from services.wire.messages import Message, Messages

Prompt: TypeAlias = str | list[Message]
"""A text to be continued, or the messages of a conversation before an answer."""


class PromptTokens:
    """Writes prompts and answers as a model reads them.

    Attributes:
        stop_ids: ids that end an answer: the model's EOS, and the token that the template writes behind a turn.
        identity: hash of tokenizer and template.
    """

    def __init__(self, folder: Path, chat_template: str | None) -> None:
        """Load the tokenizer in `folder`; SettingError for a template that cannot be used."""
        self.vocabulary = Vocabulary.from_pretrained(folder)
        self._chat = self._open_chat(folder, chat_template)
        of_turn = self._chat.vocabulary.eos_id if self._chat is not None else None
        ends = {self.vocabulary.eos_id, *_declared_ends(folder), of_turn}
        self.stop_ids: list[int] = sorted(i for i in ends if i is not None and 0 <= i < self.vocabulary.size)
        if not self.stop_ids:
            raise SettingError("start", f"the tokenizer in {folder} has no EOS, so that no answer could end")
        first = (self.vocabulary.bos_id, self.vocabulary.eos_id)
        self._first = next((i for i in first if i is not None), self.stop_ids[0])
        template = self._chat.template.hash if self._chat else ""
        self.identity = hashlib.sha256(f"{self.vocabulary.fingerprint}:{template}".encode()).hexdigest()[:32]

    def _open_chat(self, folder: Path, chosen: str | None) -> ChatTokenizer | None:
        try:
            return ChatTokenizer.from_pretrained(folder, chosen or MODEL)
        except ValueError as error:
            if chosen is not None:
                raise SettingError("chat_template", str(error)) from error
            return None  # a base model: texts are continued

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids up to where the answer begins; raises ValueError for messages that cannot be written."""
        if isinstance(prompt, str):
            ids: list[int] = self.vocabulary.encode(prompt.encode()).token_ids_T.tolist()
            return [self._first, *ids]
        written: list[int] = self._chat_of().encode_messages(Messages(prompt)).tolist()
        return written

    def with_answer(self, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt and of the answer, its end included; ValueError where they cannot be written."""
        if isinstance(prompt, str):
            [words] = self.vocabulary.encode_batch([answer.encode()], continues=bool(prompt))
            end = self.stop_ids[0] if self.vocabulary.eos_id is None else self.vocabulary.eos_id
            return self.prompt_ids(prompt), [*words.token_ids_T.tolist(), end]
        try:
            turn = self._chat_of().encode_turn(Messages(prompt), answer.encode(), ends=True)
        except TurnRefusedError as error:
            raise ValueError(str(error)) from error
        first = [] if turn.first_id is None else [turn.first_id]
        return [*first, *turn.context_ids.tolist()], turn.words.token_ids_T.tolist()

    def text_of(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of sampled ids up to the first one that ends an answer, and whether there is one."""
        stops = np.flatnonzero(np.isin(np.asarray(ids, dtype=np.int64), self.stop_ids))
        kept = ids[: stops[0]] if stops.size else ids
        special = self.vocabulary.special_ids
        data = b"".join(self.vocabulary.token_bytes(i) for i in kept if i < self.vocabulary.size and i not in special)
        return data.decode("utf-8", errors="replace"), bool(stops.size)

    def _chat_of(self) -> ChatTokenizer:
        if self._chat is None:
            raise ValueError("the model has no chat template of its own; set posttrain.chat_template, or give texts")
        return self._chat


def _declared_ends(folder: Path) -> list[int]:
    """Return the ids that the model's own files call EOS."""
    import json

    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            value: Any = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError):
            continue
        found += [value] if isinstance(value, int) else value if isinstance(value, list) else []
    return found
