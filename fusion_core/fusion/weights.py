"""Weights of the sources from their losses on the same bytes.

The rows that a source has depend on its tokenizer and on the alignment, so that several sources seldom have all rows
in common. Two sources are compared on the rows that both have: with N_ij the nats that source i loses on these rows and
B_ij their bytes, the losses l (in nats per byte) are the least-squares solution of

    sum over pairs i < j of B_ij (l_i - l_j - (N_ij - N_ji) / B_ij)^2        HodgeRank (Jiang et al. 2011), equation 4

which is transitive, and exact where all sources have the same rows. A pair without a common row is compared over all
bytes, with a weight of 1e-9 per byte, which decides only between sources that no chain of pairs connects: a masked
row's gold value is its share of the source's own loss. A source without any row takes no part.

Shape legend: S sources that answered, T target tokens, P spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Bool, Float64, Int64
from fusion_core.fusion.config import FusionConfig
from fusion_core.fusion.online import online_weights
from fusion_core.vocabulary import Encoding

_WITHOUT_COMMON_ROW = 1e-9
"""Weight of a byte in the comparison of two sources over the whole span."""
_TIE = 1e-9
"""Difference in nats per byte below which sources are equally good: the first in order is taken."""
_LARGEST_LOSS = 1e4
"""Nats that the log-probability of an impossible token counts as."""


def weigh(
    config: FusionConfig, names: Sequence[str], gold_ST: Float64, usable_ST: Bool, target: Encoding
) -> tuple[Float64, Float64]:
    """Return every source's weight in every row, before masks, and its loss in nats per byte over the window.

    Args:
        names: of the sources that answered.
        gold_ST: log-probability of the realised target tokens; of a row that a source does not have, its share of the
            source's own loss.
        usable_ST: True at the rows that a source has.
        target: the target's encoding of the window. Its end row has no bytes: it counts in no loss per byte, and is
            weighed like the token before it.

    Returns:
        Weights [S, T] that sum to one over the sources. A source without a row in the span (or window; with `online`
        without this row) has weight 0 there; where none has one, all sources weigh as in the window, with `online` as
        the text before says, or the same. Losses [S] are NaN for a source without a row, and where no bytes tell a
        loss.

    Raises ValueError when strategy `online` has a prior, but not for a source, or `min_weight` is too large for the
    number of sources.
    """
    num_text = target.num_tokens - target.ends_document
    num_bytes_T = np.diff(target.byte_ends_T, prepend=np.int32(0)).astype(np.float64)
    in_text_T = np.minimum(np.arange(target.num_tokens), max(0, num_text - 1))
    rows = _Rows(np.minimum(-gold_ST, _LARGEST_LOSS), usable_ST, num_bytes_T)
    rows.nats_ST[:, num_text:] = 0.0
    window = _compare(rows, np.zeros(target.num_tokens, dtype=np.int64))
    loss_S = window.loss_SP[:, 0]
    if config.strategy == "fixed":
        weight_S1 = _normalised(np.array([[config.weights[name]] for name in names]), window.takes_part_SP)
        return np.repeat(weight_S1, target.num_tokens, axis=1), loss_S
    if config.strategy == "online":
        prior_S = _normalised(_prior(config, names)[:, None], window.takes_part_SP)[:, 0]
        weight_ST = online_weights(prior_S, gold_ST, usable_ST, config.rate)
        # The floor is for the sources that have the row: which ones have rows later must not change it.
        return _with_floor(_normalised(weight_ST, usable_ST), usable_ST, config.min_weight), loss_S
    weight_S1 = _by_loss(config, window.loss_SP, window.takes_part_SP)
    if config.scope == "window":
        return np.repeat(weight_S1, target.num_tokens, axis=1), loss_S
    span_of_T = in_text_T // config.span_tokens
    spans = _compare(rows, span_of_T)
    # A lone dummy prefix is a row without bytes: the loss over the window is taken.
    loss_SP = np.where(np.isnan(spans.loss_SP), loss_S[:, None], spans.loss_SP)
    weight_SP = _by_loss(config, loss_SP, spans.takes_part_SP)
    weight_SP = np.where(spans.takes_part_SP.any(axis=0), weight_SP, weight_S1)
    return weight_SP[:, span_of_T], loss_S


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    nats_ST: Float64
    usable_ST: Bool
    num_bytes_T: Float64


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """Losses per span, NaN where the source has no row or the span no byte, and the sources with a row in it."""

    loss_SP: Float64
    takes_part_SP: Bool


def _compare(rows: _Rows, span_of_T: Int64) -> _Comparison:
    """Solve the least-squares problem of the module's head in every span."""
    starts_P = np.flatnonzero(np.diff(span_of_T, prepend=-1))
    if not len(starts_P):
        num_sources = len(rows.usable_ST)
        return _Comparison(np.full((num_sources, 1), np.nan), np.zeros((num_sources, 1), dtype=np.bool_))

    def per_span(values_XT: Float64) -> Float64:
        sums_XP: Float64 = np.add.reduceat(values_XT, starts_P, axis=-1)
        return sums_XP

    takes_part_SP = np.logical_or.reduceat(rows.usable_ST, starts_P, axis=1)
    usable_ST = rows.usable_ST.astype(np.float64)
    # [P, S, S]: of source i, on the rows that source j has as well.
    bytes_PSS = np.stack([per_span(row_T * usable_ST * rows.num_bytes_T).T for row_T in usable_ST], axis=1)
    nats_PSS = np.stack([per_span(nats_T * usable_ST).T for nats_T in rows.nats_ST * usable_ST], axis=1)
    nats_PSS = np.where(bytes_PSS > 0, nats_PSS, 0.0)  # a row without bytes tells no loss per byte
    bytes_P, nats_SP = per_span(rows.num_bytes_T), per_span(rows.nats_ST)
    loss_PS = _least_squares(bytes_PSS, nats_PSS, bytes_P, nats_SP.T, takes_part_SP.T)
    known_SP = takes_part_SP & (bytes_P > 0)
    return _Comparison(np.where(known_SP, loss_PS.T, np.nan), takes_part_SP)


def _least_squares(
    bytes_PSS: Float64, nats_PSS: Float64, bytes_P: Float64, whole_nats_PS: Float64, takes_part_PS: Bool
) -> Float64:
    """Return the losses, [P, S]; those of sources that take no part mean nothing."""
    num_sources = takes_part_PS.shape[1]
    pair_PSS = takes_part_PS[:, :, None] & takes_part_PS[:, None, :] & ~np.eye(num_sources, dtype=np.bool_)
    whole_PSS = _WITHOUT_COMMON_ROW * pair_PSS * np.maximum(bytes_P, 1.0)[:, None, None]
    weight_PSS = np.where(pair_PSS, bytes_PSS, 0.0) + whole_PSS
    gap_PSS = np.where(pair_PSS, nats_PSS - nats_PSS.transpose(0, 2, 1), 0.0)
    gap_PSS += _WITHOUT_COMMON_ROW * pair_PSS * (whole_nats_PS[:, :, None] - whole_nats_PS[:, None, :])
    laplacian_PSS = -weight_PSS
    diagonal = np.arange(num_sources)
    laplacian_PSS[:, diagonal, diagonal] = weight_PSS.sum(axis=2)
    # Losses are determined but for a constant: the sum of those that take part is pinned to 0, the others' each.
    pinned_PS = takes_part_PS.astype(np.float64)
    largest_P = weight_PSS.max(axis=(1, 2))
    scale_P11 = np.where(largest_P > 0, largest_P, 1.0)[:, None, None]
    laplacian_PSS += scale_P11 * pinned_PS[:, :, None] * pinned_PS[:, None, :]
    laplacian_PSS[:, diagonal, diagonal] += np.where(takes_part_PS, 0.0, scale_P11[:, :, 0])
    loss_PS: Float64 = np.linalg.solve(laplacian_PSS, gap_PSS.sum(axis=2)[:, :, None])[:, :, 0]
    return loss_PS + _level(loss_PS, bytes_PSS, nats_PSS, pair_PSS, bytes_P, whole_nats_PS, takes_part_PS)[:, None]


def _level(
    loss_PS: Float64,
    bytes_PSS: Float64,
    nats_PSS: Float64,
    pair_PSS: Bool,
    bytes_P: Float64,
    whole_nats_PS: Float64,
    takes_part_PS: Bool,
) -> Float64:
    """Return the constant, [P], with which the losses account for all nats on rows shared with another source.

    Where no two sources share a row, it accounts for the nats on the sources' own rows; where these have no bytes, for
    all nats.
    """
    own_PS = np.arange(loss_PS.shape[1])
    levels_P = np.zeros(len(bytes_P))
    settled_P = np.zeros(len(bytes_P), dtype=np.bool_)
    for counted_PS, nats_PS in (
        ((bytes_PSS * pair_PSS).sum(axis=2), (nats_PSS * pair_PSS).sum(axis=2)),
        (bytes_PSS[:, own_PS, own_PS], nats_PSS[:, own_PS, own_PS]),
        (takes_part_PS * bytes_P[:, None], takes_part_PS * whole_nats_PS),
    ):
        total_P = counted_PS.sum(axis=1)
        level_P = (nats_PS - counted_PS * loss_PS).sum(axis=1) / np.where(total_P > 0, total_P, 1.0)
        levels_P = np.where(~settled_P & (total_P > 0), level_P, levels_P)
        settled_P |= total_P > 0
    return levels_P


def _prior(config: FusionConfig, names: Sequence[str]) -> Float64:
    if not config.prior:
        return np.ones(len(names))
    for name in names:
        if name not in config.prior:
            raise ValueError(f"prior: none for source {name!r}, there are {sorted(config.prior)}")
    return np.array([config.prior[name] for name in names], dtype=np.float64)


def _by_loss(config: FusionConfig, loss_SP: Float64, takes_part_SP: Bool) -> Float64:
    """Return weights, [S, P], by `min_ce` or `avg_ce`; equal ones for those that take part where no loss is known."""
    loss_SP = np.where(takes_part_SP, np.where(np.isnan(loss_SP), 0.0, loss_SP), np.inf)
    lowest_P = np.where(takes_part_SP.any(axis=0), loss_SP.min(axis=0), 0.0)
    if config.strategy == "min_ce":
        best_P = (loss_SP <= lowest_P + _TIE).argmax(axis=0)
        raw_SP = (np.arange(len(loss_SP))[:, None] == best_P).astype(np.float64)
    else:
        raw_SP = np.exp(-(loss_SP - lowest_P) / config.tau)
    return _with_floor(_normalised(raw_SP, takes_part_SP), takes_part_SP, config.min_weight)


def _normalised(raw_SP: Float64, takes_part_SP: Bool) -> Float64:
    """Return the weights of those that take part, summing to one; where none does, all weights, or equal ones."""
    kept_SP = raw_SP * takes_part_SP
    kept_SP = np.where(kept_SP.any(axis=0), kept_SP, raw_SP)
    kept_SP = np.where(kept_SP.any(axis=0), kept_SP, 1.0)
    weight_SP: Float64 = kept_SP / kept_SP.sum(axis=0)
    return weight_SP


def _with_floor(weight_SP: Float64, takes_part_SP: Bool, least: float) -> Float64:
    """Return weights of at least that much for those that take part, still summing to one."""
    num_P = takes_part_SP.sum(axis=0)
    if least * num_P.max(initial=0) > 1.0:
        raise ValueError(f"min_weight: {least} for each of {num_P.max()} sources is more than 1 for all of them")
    floored_SP: Float64 = np.where(takes_part_SP, least + (1.0 - least * num_P) * weight_SP, weight_SP)
    return floored_SP
