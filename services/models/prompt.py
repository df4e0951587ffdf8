"""A passage in the tokens of one model: the same for a source that scores it and for the target that learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Int32
from fusion_core.vocabulary import Encoding, Vocabulary
from services.wire.passage import Passage


@dataclass(frozen=True, slots=True)
class Prompt:
    """A passage in a model's tokens.

    Attributes:
        text: the passage's text.
        context_ids: int32, the tokens before the text; they get no rows.
        encoding: of the text, EOS behind it where the passage ends its document.
    """

    text: bytes
    context_ids: Int32
    encoding: Encoding

    @property
    def num_tokens(self) -> int:
        """The number of tokens of context and text, EOS included, BOS not."""
        return int(self.context_ids.size) + self.encoding.num_tokens


def encode_passages(vocabulary: Vocabulary, passages: Sequence[Passage]) -> list[Prompt]:
    """Return the passages in tokens. A vocabulary without EOS gives no end row.

    Context and text are tokenised apart, the text without dummy prefix, so that a row boundary lies between them
    whatever the tokenizer; where the cut is a boundary of the whole document's tokens, these are the same tokens.
    """
    with_context = [passage for passage in passages if passage.context]
    contexts = iter(vocabulary.encode_batch([passage.context for passage in with_context]))
    after = iter(vocabulary.encode_batch([passage.text for passage in with_context], continues=True))
    alone = iter(vocabulary.encode_batch([passage.text for passage in passages if not passage.context]))
    prompts = []
    for passage in passages:
        context_ids = next(contexts).token_ids_T if passage.context else np.empty(0, dtype=np.int32)
        encoding = next(after if passage.context else alone)
        if passage.ends_document and vocabulary.eos_id is not None:
            encoding = encoding.with_end(vocabulary.eos_id)
        prompts.append(Prompt(passage.text, context_ids, encoding))
    return prompts
