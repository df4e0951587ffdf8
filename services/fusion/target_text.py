"""A passage in the target's tokens, as a fusion service is configured to have them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary
from services.base.errors import InvalidArgumentError
from services.fusion.config import FusionServiceConfig
from services.models.chat_tokenizer import open_chat
from services.models.prompt import Prompt, encode_passages
from services.wire.passage import Passage

logger = logging.getLogger("ray.serve")


class UnfusableTextError(InvalidArgumentError):
    """A text that can never be fused: the target's tokenizer keeps nothing of it, or too few sources take it.

    `refused_by` names the sources that do not take it.
    """

    def __init__(self, message: str, refused_by: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.refused_by = tuple(refused_by)


class TargetText:
    """The target's vocabulary, and the splitting of passages into its tokens."""

    def __init__(self, config: FusionServiceConfig) -> None:
        self._reads_context = config.target_context
        self.vocabulary = Vocabulary.from_pretrained(Path(config.tokenizer))
        if self.vocabulary.eos_id is None:
            logger.warning("the target's tokenizer has no EOS: blocks have no end row, and the target learns no end")
        eos_token = next((n for n, i in self.vocabulary.special_tokens.items() if i == self.vocabulary.eos_id), None)
        self._chat = open_chat(config.tokenizer, config.target_chat_template, eos_token)

    def encode(self, passage: Passage) -> Prompt:
        """Return the target's tokens, and EOS behind the text where the document ends and there is an EOS.

        Context and messages are left out where the target does not read them. Raises UnfusableTextError when the text
        has no tokens, or the target's chat template refuses the turn.
        """
        if not self._reads_context:
            passage = replace(passage, context=b"")
        if self._chat is None:
            passage = replace(passage, messages=b"")
        try:
            [prompt] = encode_passages(self.vocabulary, [passage], self._chat)
        except InvalidArgumentError as error:
            raise UnfusableTextError(f"target: {error}") from error
        if prompt.encoding.without_end().num_tokens == 0:
            raise UnfusableTextError("texts: the target's tokenizer keeps nothing of this text")
        return prompt

    def without_distributions(self, prompt: Prompt) -> Block:
        """Return a block of the realised tokens alone: no candidates, all mass in the tail, every row masked."""
        encoding, num_tokens = prompt.encoding, prompt.encoding.num_tokens
        return Block(
            text_bytes=prompt.text,
            token_ids_T=encoding.token_ids_T,
            byte_ends_T=encoding.byte_ends_T,
            topk_ids_TK=np.zeros((num_tokens, 0), dtype=np.int32),
            topk_logprobs_TK=np.zeros((num_tokens, 0), dtype=np.float32),
            tail_T=np.zeros(num_tokens, dtype=np.float32),
            gold_T=np.full(num_tokens, -np.inf, dtype=np.float32),
            vocabulary=self.vocabulary.fingerprint,
            mask_T=np.zeros(num_tokens, dtype=np.bool_),
            covered_mass=0.0,
            ends_document=encoding.ends_document,
            context_ids_C=prompt.context_ids,
            first_id=prompt.first_id,
        )
