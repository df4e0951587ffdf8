"""A fused window as an example of a Hugging Face data set.

Columns, for L tokens of which N are learned:
    input_ids        [L], the first one (BOS), the context, and the window's own tokens
    labels           [L], as transformers has them: the token itself where it is learned, -100 before the window
    topk_ids         [N, K], candidates of the fused row that predicts each learned token, -1 where padded
    topk_logprobs    [N, K], nats, a lowest finite number where padded
    tail             [N], log of the mass outside the candidates
    fused            [N], False where the row must not be learned from; the token itself may be
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary

IGNORED_LABEL = -100
LOWEST = float(np.finfo(np.float32).min)
"""Log-probability of nothing: the files of a data set have no infinity that every reader takes."""


def first_token(vocabulary: Vocabulary) -> int:
    """Return the token in front of every window: BOS, or EOS where a tokenizer has none; ValueError without both."""
    for token in (vocabulary.bos_id, vocabulary.eos_id):
        if token is not None:
            return token
    raise ValueError("tokenizer: has neither BOS nor EOS; one of them stands in front of every window")


def example_of(block: Block, first: int) -> dict[str, Any]:
    """Return a block's columns as NumPy arrays; `first` is the token in front of windows that name none."""
    head = [first if block.first_id is None else block.first_id]
    before = np.concatenate([np.array(head, dtype=np.int32), block.context_ids_C])
    return {
        "input_ids": np.concatenate([before, block.token_ids_T]),
        "labels": np.concatenate([np.full(len(before), IGNORED_LABEL, dtype=np.int32), block.token_ids_T]),
        "topk_ids": block.topk_ids_TK,
        "topk_logprobs": np.maximum(block.topk_logprobs_TK, np.float32(LOWEST)),
        "tail": np.maximum(block.tail_T, np.float32(LOWEST)),
        "fused": block.mask_T,
    }
