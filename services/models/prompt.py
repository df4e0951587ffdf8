"""A passage in the tokens of one model: the same for a source that scores it and for the target that learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Int32
from fusion_core.vocabulary import Encoding, Vocabulary
from services.base.errors import InvalidArgumentError
from services.models.chat_template import TurnRefusedError
from services.models.chat_tokenizer import ChatTokenizer
from services.wire.messages import read_messages
from services.wire.passage import Passage


@dataclass(frozen=True, slots=True)
class Prompt:
    """A passage in a model's tokens.

    Attributes:
        text: the passage's text.
        context_ids: int32, the tokens before the text; they get no rows.
        encoding: of the text, EOS behind it where the passage ends its document.
        first_id: the token in front of all others; None for the one that a model puts in front of documents.
    """

    text: bytes
    context_ids: Int32
    encoding: Encoding
    first_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens of context and text, EOS included, BOS not."""
        return int(self.context_ids.size) + self.encoding.num_tokens


def encode_passages(
    vocabulary: Vocabulary, passages: Sequence[Passage], chat: ChatTokenizer | None = None
) -> list[Prompt]:
    """Return the passages in tokens. A vocabulary without EOS gives no end row.

    Context and text are tokenised apart, the text without dummy prefix, so that a row boundary lies between them
    whatever the tokenizer; where the cut is a boundary of the whole document's tokens, these are the same tokens.

    Raises InvalidArgumentError naming the passage whose messages the template of `chat` refuses, or that has messages
    where there is no `chat`.
    """
    documents = [passage for passage in passages if not passage.messages]
    with_context = [passage for passage in documents if passage.context]
    contexts = iter(vocabulary.encode_batch([passage.context for passage in with_context]))
    after = iter(vocabulary.encode_batch([passage.text for passage in with_context], continues=True))
    alone = iter(vocabulary.encode_batch([passage.text for passage in documents if not passage.context]))
    prompts = []
    for index, passage in enumerate(passages):
        if passage.messages:
            prompts.append(_turn(passage, chat, f"contexts[{index}].messages"))
            continue
        context_ids = next(contexts).token_ids_T if passage.context else np.empty(0, dtype=np.int32)
        encoding = next(after if passage.context else alone)
        if passage.ends_document and vocabulary.eos_id is not None:
            encoding = encoding.with_end(vocabulary.eos_id)
        prompts.append(Prompt(passage.text, context_ids, encoding))
    return prompts


def _turn(passage: Passage, chat: ChatTokenizer | None, field: str) -> Prompt:
    if chat is None:
        raise InvalidArgumentError(f"{field}: messages need chat_template, and none is set here")
    try:
        turn = chat.encode_turn(read_messages(passage.messages), passage.text, ends=passage.ends_document)
    except TurnRefusedError as error:
        raise InvalidArgumentError(f"{field}: {error}") from error
    return Prompt(passage.text, turn.context_ids, turn.words, turn.first_id)
