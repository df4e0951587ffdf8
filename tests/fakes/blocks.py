"""Random valid blocks for tests."""

from __future__ import annotations

import numpy as np

from fusion_core.blocks import PADDING_ID, Block, SourceShare


def random_block(
    num_tokens: int = 5, k: int = 4, seed: int = 0, vocabulary: str = "v", *, num_context: int = 0
) -> Block:
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
            context_ids_C=rng.integers(0, 1000, num_context, dtype=np.int32),
            first_id=7 if num_context else None,
        )


def scored_block(
    num_tokens: int = 5,
    k: int = 4,
    seed: int = 0,
    *,
    vocabulary: str = "v",
    vocabulary_size: int = 1000,
    sharpness: float = 1.0,
    padded: bool = False,
    ends_document: bool = False,
) -> Block:
    """Rows as a model gives them: the top k of a softmax, the rest as tail, the realised token's log-probability."""
    rng = np.random.default_rng(seed)
    logits_TV = rng.normal(size=(num_tokens, vocabulary_size)) * sharpness
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    order_TV = np.argsort(-logprobs_TV, axis=1)
    ids_TK = order_TV[:, :k].astype(np.int32)
    # Half of the realised tokens are candidates, the others any.
    likely_T = order_TV[np.arange(num_tokens), rng.integers(0, max(1, k), num_tokens)]
    token_ids_T = np.where(rng.uniform(size=num_tokens) < 0.5, likely_T, rng.integers(0, vocabulary_size, num_tokens))
    logprobs_TK = np.take_along_axis(logprobs_TV, order_TV[:, :k], axis=1)
    if padded:
        gone_TK = (rng.uniform(size=ids_TK.shape) < 0.3) & (ids_TK != token_ids_T[:, None])
        gone_TK[:, 0] = False
        ids_TK[gone_TK], logprobs_TK[gone_TK] = PADDING_ID, -np.inf
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.clip(1.0 - np.exp(logprobs_TK).sum(axis=1), 0.0, 1.0))
    ends_T = np.arange(3, 3 * num_tokens + 1, 3, dtype=np.int32)
    ends_T[num_tokens - ends_document :] -= 3
    return Block(
        text_bytes=bytes(rng.integers(97, 123, int(ends_T[-1]), dtype=np.uint8)),
        token_ids_T=token_ids_T.astype(np.int32),
        byte_ends_T=ends_T,
        topk_ids_TK=ids_TK,
        topk_logprobs_TK=logprobs_TK.astype(np.float32),
        tail_T=tail_T.astype(np.float32),
        gold_T=logprobs_TV[np.arange(num_tokens), token_ids_T].astype(np.float32),
        vocabulary=vocabulary,
        mask_T=rng.uniform(size=num_tokens) < 0.8,
        covered_mass=0.9,
        ends_document=ends_document,
    )
