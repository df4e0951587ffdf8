"""Weights of the sources from their losses on the same bytes.

Shape legend: S sources that answered, T target tokens, P spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_core.arrays import Bool, Float64, Int64
from fusion_core.fusion.config import FusionConfig
from fusion_core.vocabulary import Encoding


def weigh(
    config: FusionConfig, names: Sequence[str], gold_ST: Float64, usable_ST: Bool, target: Encoding
) -> tuple[Float64, Float64]:
    """Return every source's weight in every row, before masks, and its loss in nats per byte over the window.

    Args:
        names: of the sources that answered.
        gold_ST: log-probability of the realised target tokens.
        usable_ST: which rows a source has.
        target: the target's encoding of the window. Its end row has no bytes: it counts in no loss per byte, and is
            weighed like the token before it.

    Raises:
        ValueError: strategy `fixed` has no weight for a source, or only zeros for those that answered.
    """
    num_text = target.num_tokens - target.ends_document
    num_bytes_T = np.diff(target.byte_ends_T[:num_text], prepend=np.int32(0)).astype(np.int64)
    whole_T = np.zeros(num_text, dtype=np.int64)
    span_of_T = whole_T if config.scope == "window" else np.arange(num_text, dtype=np.int64) // config.span_tokens
    text = gold_ST[:, :num_text], usable_ST[:, :num_text], num_bytes_T
    loss_S = _nats_per_byte(*text, whole_T)[:, 0]
    weight_SP = _source_weights(config, names, _nats_per_byte(*text, span_of_T), loss_S)
    weighed_like_T = np.minimum(np.arange(target.num_tokens), max(0, num_text - 1))
    span_of_row_T = span_of_T[weighed_like_T] if num_text else weighed_like_T
    return weight_SP[:, span_of_row_T], loss_S


def _nats_per_byte(gold_ST: Float64, mask_ST: Bool, num_bytes_T: Int64, span_of_T: Int64) -> Float64:
    """[S, P] loss of every source per span, over the rows that none of them masks; NaN where these hold no byte."""
    num_spans = int(span_of_T[-1]) + 1 if len(span_of_T) else 1
    common_T = mask_ST.all(axis=0)
    bytes_P = np.bincount(span_of_T[common_T], num_bytes_T[common_T], num_spans)
    nats_SP = np.stack([np.bincount(span_of_T[common_T], -gold_T[common_T], num_spans) for gold_T in gold_ST])
    # A lone dummy prefix is a row without bytes: no loss per byte can be told from it.
    loss_SP: Float64 = np.where(bytes_P > 0, nats_SP / np.maximum(bytes_P, 1), np.nan)
    return loss_SP


def _source_weights(config: FusionConfig, names: Sequence[str], loss_SP: Float64, loss_S: Float64) -> Float64:
    """[S, P] weights that sum to one over the sources; a span where the loss is NaN uses the whole window's, and where
    that is NaN too, all sources weigh the same."""
    if config.strategy == "fixed":
        return np.repeat(_fixed_weights(config, names)[:, None], loss_SP.shape[1], axis=1)
    loss_SP = np.where(np.isnan(loss_SP), loss_S[:, None], loss_SP)
    loss_SP = np.where(np.isnan(loss_SP), 0.0, loss_SP)
    if config.strategy == "min_ce":
        lowest_SP: Float64 = (np.arange(len(names))[:, None] == loss_SP.argmin(axis=0)[None, :]).astype(np.float64)
        return lowest_SP
    weight_SP: Float64 = np.exp(-(loss_SP - loss_SP.min(axis=0)) / config.tau)
    weight_SP /= weight_SP.sum(axis=0)
    return weight_SP


def _fixed_weights(config: FusionConfig, names: Sequence[str]) -> Float64:
    unknown = [name for name in names if name not in config.weights]
    if unknown:
        raise ValueError(f"weights: no weight for source {unknown[0]!r}, there are {sorted(config.weights)}")
    weight_S: Float64 = np.array([config.weights[name] for name in names])
    if not weight_S.any():
        raise ValueError(f"weights: all sources that answered ({', '.join(names)}) have weight 0")
    weight_S /= weight_S.sum()
    return weight_S
