"""Passages: the texts that sources score, each with its place in a document."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fusion.v1 import block_pb2
from services.base.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, UTF-8.

    Attributes:
        text: the bytes that get rows.
        context: the bytes right before them in the document: read by the model, without rows.
        ends_document: whether the document ends with the text; a row for EOS is then wanted behind it.
    """

    text: bytes
    context: bytes = b""
    ends_document: bool = False

    @property
    def identity(self) -> bytes:
        """A hash of all that a source's answer depends on, the source itself apart."""
        head = f"{len(self.context)}:{int(self.ends_document)}:".encode()
        return hashlib.sha256(head + self.context + self.text).digest()


def passages_of(
    texts: Sequence[bytes], contexts: Sequence[block_pb2.TextContext], *, max_text_bytes: int
) -> list[Passage]:
    """Return the passages of a request; InvalidArgumentError names the text that is empty, too long or not UTF-8."""
    if contexts and len(contexts) != len(texts):
        raise InvalidArgumentError(f"contexts: {len(contexts)} for {len(texts)} texts; give one for each, or none")
    passages = [Passage(text) for text in texts]
    if contexts:
        pairs = zip(texts, contexts, strict=True)
        passages = [Passage(text, context.preceding, context.ends_document) for text, context in pairs]
    for index, passage in enumerate(passages):
        if not passage.text:
            raise InvalidArgumentError(f"texts[{index}]: must not be empty")
        num_bytes = len(passage.text) + len(passage.context)
        if num_bytes > max_text_bytes:
            with_context = " with what precedes them" if passage.context else ""
            raise InvalidArgumentError(
                f"texts[{index}]: {num_bytes} bytes{with_context}; at most {max_text_bytes} are accepted"
            )
        for field, data in ((f"texts[{index}]", passage.text), (f"contexts[{index}].preceding", passage.context)):
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidArgumentError(f"{field}: not UTF-8 at byte {error.start}") from error
    return passages


def contexts_of(passages: Sequence[Passage]) -> list[block_pb2.TextContext]:
    """Return the contexts to send beside the texts; none when no passage has any."""
    if not any(passage.context or passage.ends_document for passage in passages):
        return []
    return [
        block_pb2.TextContext(preceding=passage.context, ends_document=passage.ends_document) for passage in passages
    ]
