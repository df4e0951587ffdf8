"""Weights of the sources from their losses on the same bytes.

Shape legend: S sources that answered, T target tokens, P spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion_core.arrays import Bool, Float64, Int64
from fusion_core.fusion.config import FusionConfig


def nats_per_byte(gold_ST: Float64, mask_ST: Bool, num_bytes_T: Int64, span_of_T: Int64) -> Float64:
    """[S, P] loss of every source per span, over the rows that none of them masks; NaN where these hold no byte."""
    num_spans = int(span_of_T[-1]) + 1 if len(span_of_T) else 1
    common_T = mask_ST.all(axis=0)
    bytes_P = np.bincount(span_of_T[common_T], num_bytes_T[common_T], num_spans)
    nats_SP = np.stack([np.bincount(span_of_T[common_T], -gold_T[common_T], num_spans) for gold_T in gold_ST])
    # A lone dummy prefix is a row without bytes: no loss per byte can be told from it.
    loss_SP: Float64 = np.where(bytes_P > 0, nats_SP / np.maximum(bytes_P, 1), np.nan)
    return loss_SP


def source_weights(config: FusionConfig, names: Sequence[str], loss_SP: Float64, loss_S: Float64) -> Float64:
    """[S, P] weights that sum to one over the sources.

    Args:
        loss_SP: nats per byte in every span; a span where it is NaN uses the whole window's.
        loss_S: nats per byte in the window; where it is NaN too, no source can be preferred and all weigh the same.

    Raises:
        ValueError: strategy `fixed` has no weight for a source, or only zeros for those that answered.
    """
    if config.strategy == "fixed":
        unknown = [name for name in names if name not in config.weights]
        if unknown:
            raise ValueError(f"weights: no weight for source {unknown[0]!r}, there are {sorted(config.weights)}")
        weight_S = np.array([config.weights[name] for name in names])
        if not weight_S.any():
            raise ValueError(f"weights: all sources that answered ({', '.join(names)}) have weight 0")
        return np.repeat((weight_S / weight_S.sum())[:, None], loss_SP.shape[1], axis=1)
    loss_SP = np.where(np.isnan(loss_SP), loss_S[:, None], loss_SP)
    loss_SP = np.where(np.isnan(loss_SP), 0.0, loss_SP)
    if config.strategy == "min_ce":
        lowest_SP: Float64 = (np.arange(len(names))[:, None] == loss_SP.argmin(axis=0)[None, :]).astype(np.float64)
        return lowest_SP
    weight_SP: Float64 = np.exp(-(loss_SP - loss_SP.min(axis=0)) / config.tau)
    weight_SP /= weight_SP.sum(axis=0)
    return weight_SP
