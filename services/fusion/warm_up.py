"""A made-up answer of a source: fusing it before the first caller comes compiles all loops."""

from __future__ import annotations

import numpy as np

from fusion_core.blocks import Block
from fusion_core.vocabulary import Vocabulary

TEXT = b"A window of a few words, 1 and 2 and a line's end.\nOne more.\n"


def made_up_block(vocabulary: Vocabulary, k: int) -> Block:
    """Return a block of `TEXT` with candidates: half of a row's mass spread evenly over its candidates."""
    encoding = vocabulary.encode(TEXT)
    if vocabulary.eos_id is not None:
        encoding = encoding.with_end(vocabulary.eos_id)
    ids_TK = (encoding.token_ids_T[:, None] + np.arange(k, dtype=np.int32)) % vocabulary.size
    shape = ids_TK.shape
    return Block(
        text_bytes=TEXT,
        token_ids_T=encoding.token_ids_T,
        byte_ends_T=encoding.byte_ends_T,
        topk_ids_TK=ids_TK.astype(np.int32),
        topk_logprobs_TK=np.full(shape, np.log(0.5 / k), dtype=np.float32),
        tail_T=np.full(shape[0], np.log(0.5), dtype=np.float32),
        gold_T=np.full(shape[0], np.log(0.5 / k), dtype=np.float32),
        vocabulary=vocabulary.fingerprint,
        mask_T=encoding.lossless_T,
        ends_document=encoding.ends_document,
    )
