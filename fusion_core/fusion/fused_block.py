"""One fused block from the projected rows of several sources.

Shape legend: S sources that answered, T target tokens, M entries of all sources side by side, K candidates kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.blocks import Block, SourceShare
from fusion_core.fusion.config import FusionConfig
from fusion_core.fusion.mixture import mix_rows
from fusion_core.fusion.weights import nats_per_byte, source_weights
from fusion_core.vocabulary import Encoding


class TooFewSources(ValueError):  # noqa: N818 - it says what is the matter, as StopIteration does
    """Fewer sources answered for a window than the configuration asks for."""


def fuse(
    text: bytes,
    target: Encoding,
    sources: Mapping[str, ProjectedRows | None],
    config: FusionConfig,
    vocabulary: str,
) -> Block:
    """The fused distribution of every target token of one window.

    Args:
        text: the window, UTF-8.
        target: the target's encoding of it, EOS behind it where the block gets an end row.
        sources: per source name its rows in the target's vocabulary, None when it did not answer. The target itself
            may be one of them.
        config: how the sources are weighed.
        vocabulary: fingerprint of the target's vocabulary.

    Returns:
        A block of `config.k_out` candidates per row. A row is a mixture of the sources that could give it, with their
        weights normalised; it is masked when none of weight above zero could. `shares` lists every source, those that
        did not answer as not present.

    Raises:
        TooFewSources: fewer than `config.min_sources` answered.
        ValueError: a source's rows are not those of `target`, or strategy `fixed` lacks a weight.
    """
    present = {name: rows for name, rows in sources.items() if rows is not None}
    if len(present) < config.min_sources:
        absent = [name for name in sources if name not in present]
        raise TooFewSources(
            f"min_sources: {len(present)} of {len(sources)} sources answered, at least {config.min_sources} are needed"
            + (f" (missing: {', '.join(absent)})" if absent else "")
        )
    num_tokens = target.num_tokens
    for name, rows in present.items():
        if rows.num_tokens != num_tokens:
            raise ValueError(f"source {name!r}: {rows.num_tokens} rows for {num_tokens} target tokens")
    gold_ST = np.stack([rows.gold_T for rows in present.values()]).astype(np.float64)
    mask_ST = np.stack([rows.mask_T for rows in present.values()])
    # The end row has no bytes: it counts in no loss per byte, and is weighed like the token before it.
    num_text = num_tokens - target.ends_document
    num_bytes_T = np.diff(target.byte_ends_T[:num_text], prepend=np.int32(0)).astype(np.int64)
    whole_T = np.zeros(num_tokens, dtype=np.int64)
    in_order_T = np.minimum(np.arange(num_tokens, dtype=np.int64), max(0, num_text - 1))
    span_of_T = whole_T if config.scope == "window" else in_order_T // config.span_tokens
    text_gold_ST, text_mask_ST = gold_ST[:, :num_text], mask_ST[:, :num_text]
    loss_S = nats_per_byte(text_gold_ST, text_mask_ST, num_bytes_T, whole_T[:num_text])[:, 0]
    loss_SP = nats_per_byte(text_gold_ST, text_mask_ST, num_bytes_T, span_of_T[:num_text])
    asked_ST = source_weights(config, list(present), loss_SP, loss_S)[:, span_of_T]

    available_ST = asked_ST * mask_ST
    sum_T = available_ST.sum(axis=0)
    mask_T = sum_T > 0
    weight_ST = available_ST / np.where(mask_T, sum_T, 1.0)
    widths = [rows.ids_TM.shape[1] for rows in present.values()]
    topk_ids_TK = np.full((num_tokens, config.k_out), -1, dtype=np.int32)
    topk_probs_TK = np.zeros((num_tokens, config.k_out), dtype=np.float32)
    tail_T, covered_T = np.zeros(num_tokens), np.zeros(num_tokens)
    mix_rows(
        np.concatenate([rows.ids_TM for rows in present.values()], axis=1),
        np.concatenate([rows.probs_TM for rows in present.values()], axis=1),
        np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
        np.stack([rows.tail_T for rows in present.values()]),
        weight_ST,
        target.token_ids_T,
        topk_ids_TK,
        topk_probs_TK,
        tail_T,
        covered_T,
    )
    # A masked row's gold keeps the sum over the window equal to the weighted sources' own loss.
    gold_weight_ST = np.where(mask_T, weight_ST, asked_ST)
    with np.errstate(divide="ignore"):
        gold_T = np.logaddexp.reduce(np.log(gold_weight_ST) + gold_ST, axis=0)
        topk_logprobs_TK = np.log(topk_probs_TK)
        log_tail_T = np.log(np.maximum(tail_T, 0.0)).astype(np.float32)
    gold_T = np.minimum(gold_T, 0.0).astype(np.float32)
    # float32 probabilities vanish below e^-103, log-probabilities do not.
    realised_TK = topk_ids_TK == target.token_ids_T[:, None]
    topk_logprobs_TK = np.where(realised_TK, gold_T[:, None], topk_logprobs_TK)
    mean_weight_S = weight_ST[:, mask_T].mean(axis=1) if mask_T.any() else np.zeros(len(present))
    measured = dict(zip(present, zip(mean_weight_S.tolist(), loss_S.tolist(), strict=True), strict=True))
    return Block(
        text_bytes=text,
        token_ids_T=target.token_ids_T,
        byte_ends_T=target.byte_ends_T,
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=topk_logprobs_TK,
        tail_T=log_tail_T,
        gold_T=gold_T,
        vocabulary=vocabulary,
        mask_T=mask_T,
        shares=tuple(SourceShare(name, name in measured, *measured.get(name, (0.0, float("nan")))) for name in sources),
        covered_mass=float(covered_T[mask_T].mean()) if mask_T.any() else float("nan"),
        ends_document=target.ends_document,
    )
