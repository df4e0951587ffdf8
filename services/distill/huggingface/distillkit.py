"""A fused window as DistillKit's offline distillation reads it, from a data set that is packed already.

DistillKit (arcee-ai/DistillKit, revision a61c2e7) takes `token_ids` and `top_values` as they are where a row has
them. The row at a position predicts the next position's token and counts where the label at its own position is one;
the cross-entropy counts at the next position. A position therefore has both or neither, but for the ends: the last
token of a window has no row behind it and so no label. Nor has a token behind which the row must not be learned from,
nor the last token of a context, so that the first row behind a context is lost.

Shape legend: L positions of the window, N of every example, K candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusion_core.blocks import PADDING_ID, Block
from services.distill.huggingface.example import IGNORED_LABEL, example_of

_NOTHING = np.float32(-1e4)
"""Log-probability of nothing: its exponential is 0, and no temperature makes it infinite."""


def distillkit_example_of(block: Block, first: int, length: int) -> dict[str, Any]:
    """Return columns of `length` positions: input_ids, attention_mask, labels [N]; token_ids and top_values [N, K].

    Raises ValueError when the window is longer.
    """
    example = example_of(block, first)
    num_positions, before = len(example["input_ids"]), 1 + block.context_ids_C.size
    if num_positions > length:
        raise ValueError(f"--length: a window has {num_positions} tokens with those before it, more than {length}")
    input_ids_N = np.zeros(length, dtype=np.int32)
    input_ids_N[:num_positions] = example["input_ids"]
    rows = slice(before - 1, num_positions - 1)
    counts_N = np.zeros(length, dtype=np.bool_)
    counts_N[rows] = block.mask_T
    if block.context_ids_C.size:
        counts_N[before - 1] = False
    there_TK = block.topk_ids_TK != PADDING_ID
    token_ids_NK = np.zeros((length, block.k), dtype=np.int32)
    top_values_NK = np.full((length, block.k), _NOTHING, dtype=np.float32)
    token_ids_NK[rows] = np.where(there_TK, block.topk_ids_TK, 0)
    top_values_NK[rows] = np.where(there_TK, np.maximum(block.topk_logprobs_TK, _NOTHING), _NOTHING)
    return {
        "input_ids": input_ids_N,
        "attention_mask": (np.arange(length) < num_positions).astype(np.int32),
        "labels": np.where(counts_N, input_ids_N, np.int32(IGNORED_LABEL)),
        "token_ids": token_ids_NK,
        "top_values": top_values_NK,
    }
