"""Passages: the texts that sources score, each with its place in a document or a conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fusion.v1 import block_pb2
from services.base.errors import InvalidArgumentError
from services.wire.messages import read_messages


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, or an assistant's turn in a conversation, UTF-8.

    Attributes:
        text: the bytes that get rows.
        context: the bytes right before them in the document: read by the model, without rows.
        ends_document: whether the document, or the turn, ends with the text; a row for EOS is then wanted behind it.
        messages: the messages before a turn, as `messages.Messages.to_bytes` writes them; each model reads them as its
            chat template writes them. A passage has `messages` or `context`, not both.
    """

    text: bytes
    context: bytes = b""
    ends_document: bool = False
    messages: bytes = b""

    @property
    def identity(self) -> bytes:
        """A hash of all that a source's answer depends on, the source itself apart."""
        before, kind = (self.messages, "messages:") if self.messages else (self.context, "")
        head = f"{kind}{len(before)}:{int(self.ends_document)}:".encode()
        return hashlib.sha256(head + before + self.text).digest()


def passages_of(
    texts: Sequence[bytes], contexts: Sequence[block_pb2.TextContext], *, max_text_bytes: int
) -> list[Passage]:
    """Return the passages of a request; InvalidArgumentError names the text that is empty, too long or not UTF-8."""
    if contexts and len(contexts) != len(texts):
        raise InvalidArgumentError(f"contexts: {len(contexts)} for {len(texts)} texts; give one for each, or none")
    passages = [Passage(text) for text in texts]
    if contexts:
        pairs = zip(texts, contexts, strict=True)
        passages = [Passage(text, c.preceding, c.ends_document, c.messages) for text, c in pairs]
    for index, passage in enumerate(passages):
        if not passage.text:
            raise InvalidArgumentError(f"texts[{index}]: must not be empty")
        num_bytes = len(passage.text) + len(passage.context) + len(passage.messages)
        if num_bytes > max_text_bytes:
            with_context = " with what precedes them" if passage.context or passage.messages else ""
            raise InvalidArgumentError(
                f"texts[{index}]: {num_bytes} bytes{with_context}; at most {max_text_bytes} are accepted"
            )
        for field, data in ((f"texts[{index}]", passage.text), (f"contexts[{index}].preceding", passage.context)):
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidArgumentError(f"{field}: not UTF-8 at byte {error.start}") from error
        if passage.messages:
            _check_messages(passage, f"contexts[{index}]")
    return passages


def _check_messages(passage: Passage, field: str) -> None:
    if passage.context:
        raise InvalidArgumentError(f"{field}: preceding and messages are both set; give one of them")
    try:
        read_messages(passage.messages)
    except ValueError as error:
        raise InvalidArgumentError(f"{field}.messages: {error}") from error


def contexts_of(passages: Sequence[Passage]) -> list[block_pb2.TextContext]:
    """Return the contexts to send beside the texts; none when no passage has any."""
    if not any(passage.context or passage.ends_document or passage.messages for passage in passages):
        return []
    return [
        block_pb2.TextContext(preceding=p.context, ends_document=p.ends_document, messages=p.messages) for p in passages
    ]
