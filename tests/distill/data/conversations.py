"""Blocks with contexts, made up from ids: single windows, and the turns of conversations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusion_core.blocks import Block
from tests.fakes.blocks import random_block

SIZE = 300
"""Ids of the vocabulary; 0 is BOS."""


def block_of(num_tokens: int, context: np.ndarray, seed: int) -> Block:
    """A block of random tokens and rows behind a context."""
    block = random_block(num_tokens, 4, seed)
    return replace(
        block,
        token_ids_T=block.token_ids_T % SIZE,
        topk_ids_TK=np.argsort(np.random.default_rng(seed).random((num_tokens, SIZE)))[:, :4].astype(np.int32),
        context_ids_C=context.astype(np.int32),
    )


def conversation(turns: list[tuple[int, int]], seed: int) -> list[Block]:
    """The turns of a conversation: per turn the number of tokens before it that are new, and of its own.

    Its first token is `seed`, so that conversations of other seeds are told from it by every turn.
    """
    generator, before, blocks = np.random.default_rng(seed), np.empty(0, dtype=np.int32), []
    for number, (num_new, num_tokens) in enumerate(turns):
        context = np.concatenate([before, generator.integers(1, SIZE, num_new, dtype=np.int32)])
        blocks.append(block_of(num_tokens, context, seed=1000 * seed + number))
        if number == 0:
            (context if num_new else blocks[0].token_ids_T)[0] = seed
            blocks[0] = replace(blocks[0], context_ids_C=context)
        before = np.concatenate([context, blocks[-1].token_ids_T])
    return blocks
