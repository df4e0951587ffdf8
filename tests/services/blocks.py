"""Random valid blocks for tests."""

from __future__ import annotations

import numpy as np

from fusion_core.blocks import Block, SourceShare


def random_block(num_tokens: int = 5, k: int = 4, seed: int = 0, vocabulary: str = "v") -> Block:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(k + 1), size=num_tokens)
    order = np.argsort(-probs[:, :k], axis=1)
    topk = np.take_along_axis(probs[:, :k], order, axis=1)
    with np.errstate(divide="ignore"):
        return Block(
            text_bytes=bytes(rng.integers(97, 123, num_tokens * 3, dtype=np.uint8)),
            token_ids_T=rng.integers(0, 1000, num_tokens, dtype=np.int32),
            byte_ends_T=np.arange(3, 3 * num_tokens + 1, 3, dtype=np.int32),
            topk_ids_TK=rng.integers(0, 1000, (num_tokens, k), dtype=np.int32),
            topk_logprobs_TK=np.log(topk).astype(np.float32),
            tail_T=np.log(probs[:, k]).astype(np.float32),
            gold_T=np.log(rng.uniform(0.01, 1.0, num_tokens)).astype(np.float32),
            vocabulary=vocabulary,
            mask_T=rng.uniform(size=num_tokens) < 0.8,
            shares=(SourceShare("a", True, 0.25, 1.5), SourceShare("b", False, 0.0, float("nan"))),
            covered_mass=0.9,
        )
