"""One fused block from the projected rows of several sources.

Shape legend: S sources that answered, T target tokens, M entries of all sources side by side, K candidates kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Bool, Float32, Float64, Int32
from fusion_core.blocks import Block, SourceShare
from fusion_core.fusion.config import FusionConfig
from fusion_core.fusion.mixture import Mixture, mix
from fusion_core.fusion.weights import weigh
from fusion_core.vocabulary import Encoding

Array = TypeVar("Array", Float32, Float64)


class TooFewSources(ValueError):  # noqa: N818 - named after its cause, as StopIteration is
    """Fewer sources answered for a window than the configuration asks for; the missing ones may answer later."""


class FusedInDetail(NamedTuple):
    """A fused block, and what it was made of.

    By source its own block and its rows in the target's vocabulary, None where it gave none; `problems` says why.
    """

    block: Block
    blocks: Mapping[str, Block | None]
    rows: Mapping[str, ProjectedRows | None]
    problems: Mapping[str, Exception]


def fuse(
    text: bytes,
    target: Encoding,
    sources: Mapping[str, ProjectedRows | None],
    config: FusionConfig,
    vocabulary: str,
    *,
    k_out: int | None = None,
    min_sources: int | None = None,
) -> Block:
    """Return the fused distribution of every target token of one window.

    `fusion_core.fusion.weights` says how sources are weighed where they do not have the same rows.

    Args:
        text: the window, UTF-8.
        target: the target's encoding of it, EOS behind it where the block gets an end row.
        sources: per source name its rows in the target's vocabulary, None when it did not answer. The target itself
            may be one of them.
        config: strategy and limits.
        vocabulary: fingerprint of the target's vocabulary.
        k_out: candidates kept per row; the configuration's when not set.
        min_sources: sources that must have answered; the configuration's when not set.

    Returns:
        A block of `k_out` candidates per row. A row is a mixture of the sources that could give it, with their
        weights normalised; it is masked when no source of weight above zero could. `shares` lists every source: one
        that did not answer is not present, one that answered without a usable row has weight 0 and no loss.

    Raises:
        TooFewSources: fewer than `min_sources` answered, or with strategy `fixed` none of weight above 0, where one
            that did not answer has such a weight.
        ValueError: a source's rows are not those of `target`, or strategy `fixed` lacks a weight, or has only zeros for
            the sources that were asked; or `weigh` refuses the settings.
    """
    present = {name: rows for name, rows in sources.items() if rows is not None}
    _check_quorum(sources, present, config.min_sources if min_sources is None else min_sources)
    if config.strategy == "fixed":
        _check_weights(config.weights, sources, present)
    for name, rows in present.items():
        if rows.num_tokens != target.num_tokens:
            raise ValueError(f"source {name!r}: {rows.num_tokens} rows for {target.num_tokens} target tokens")
    weights = row_weights(present, target, config)
    weight_ST, mask_T = weights.of_rows_ST, weights.mask_T
    mixture = mix(list(present.values()), weight_ST, target.token_ids_T, config.k_out if k_out is None else k_out)
    # A masked row's gold keeps the sum over the window equal to the weighted sources' own loss.
    gold_ST = np.stack([rows.gold_T for rows in present.values()]).astype(np.float64)
    gold_T = _log_mixture(gold_ST, np.where(mask_T, weight_ST, weights.asked_ST))
    logprobs_TK = _candidate_logprobs(mixture, target.token_ids_T, gold_T)
    tail_T = _log(mixture.tail_T).astype(np.float32)
    if config.soften < 1.0:
        scale_T = _log_of_sum(logprobs_TK, tail_T, config.soften)
        logprobs_TK, tail_T = config.soften * logprobs_TK - scale_T[:, None], config.soften * tail_T - scale_T
        gold_T = np.where(mask_T, config.soften * gold_T - scale_T, gold_T)
    return Block(
        text_bytes=text,
        token_ids_T=target.token_ids_T,
        byte_ends_T=target.byte_ends_T,
        topk_ids_TK=mixture.ids_TK,
        topk_logprobs_TK=logprobs_TK,
        tail_T=tail_T,
        gold_T=gold_T,
        vocabulary=vocabulary,
        mask_T=mask_T,
        shares=_shares(list(sources), list(present), weight_ST[:, mask_T], weights.loss_S),
        covered_mass=float(mixture.covered_T[mask_T].mean()) if mask_T.any() else float("nan"),
        ends_document=target.ends_document,
    )


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """The sources' weights in the rows of one window.

    Attributes:
        of_rows_ST: float64, normalised over the sources that have each row; all 0 where the row is masked.
        asked_ST: float64, as `weigh` gives them, whether a source has the row or not.
        mask_T: bool, False where no source of weight above zero has the row.
        loss_S: float64, each source's nats per byte over the window.
    """

    of_rows_ST: Float64
    asked_ST: Float64
    mask_T: Bool
    loss_S: Float64


def row_weights(present: Mapping[str, ProjectedRows], target: Encoding, config: FusionConfig) -> RowWeights:
    """Return the weights of the sources that answered in each row."""
    gold_ST = np.stack([rows.gold_T for rows in present.values()]).astype(np.float64)
    usable_ST = np.stack([rows.mask_T for rows in present.values()])
    asked_ST, loss_S = weigh(config, list(present), gold_ST, usable_ST, target)
    of_rows_ST, mask_T = _over_usable(asked_ST, usable_ST)
    return RowWeights(of_rows_ST, asked_ST, mask_T, loss_S)


def _check_quorum(
    sources: Mapping[str, ProjectedRows | None], present: Mapping[str, ProjectedRows], min_sources: int
) -> None:
    if len(present) >= max(1, min_sources):
        return
    absent = [name for name in sources if name not in present]
    raise TooFewSources(
        f"min_sources: {len(present)} of {len(sources)} sources answered, at least {min_sources} are needed"
        + (f" (missing: {', '.join(absent)})" if absent else "")
    )


def _check_weights(
    weights: Mapping[str, float], sources: Mapping[str, ProjectedRows | None], present: Mapping[str, ProjectedRows]
) -> None:
    """Raise TooFewSources when no source of weight above 0 answered, ValueError when none was asked."""
    for name in sources:
        if name not in weights:
            raise ValueError(f"weights: no weight for source {name!r}, there are {sorted(weights)}")
    if any(weights[name] > 0 for name in present):
        return
    message = f"weights: all sources that answered ({', '.join(present)}) have weight 0"
    weighted = [name for name in sources if weights[name] > 0]
    if weighted:
        raise TooFewSources(f"{message} (missing: {', '.join(weighted)})")
    raise ValueError(f"{message}; at least one that is asked must have more")


def _over_usable(asked_ST: Float64, usable_ST: Bool) -> tuple[Float64, Bool]:
    """Return the weights normalised over the sources that have each row, and the rows that a source of weight has."""
    available_ST = asked_ST * usable_ST
    sum_T = available_ST.sum(axis=0)
    mask_T: Bool = sum_T > 0
    return available_ST / np.where(mask_T, sum_T, 1.0), mask_T


def _log_mixture(logprobs_ST: Float64, weight_ST: Float64) -> Float32:
    """Return the logarithm of the weighted mean of probabilities, at most 0."""
    mixed_T: Float64 = np.logaddexp.reduce(_log(weight_ST) + logprobs_ST, axis=0)
    return np.minimum(mixed_T, 0.0).astype(np.float32)


def _candidate_logprobs(mixture: Mixture, token_ids_T: Int32, gold_T: Float32) -> Float32:
    """Return log-probabilities of the candidates, the realised token's from `gold_T`: float32 probabilities vanish
    below e^-103, log-probabilities do not."""
    realised_TK = mixture.ids_TK == token_ids_T[:, None]
    logprobs_TK: Float32 = np.where(realised_TK, gold_T[:, None], _log(mixture.probs_TK))
    return logprobs_TK


def _log_of_sum(logprobs_TK: Float32, tail_T: Float32, power: float) -> Float32:
    """Return the logarithm of the sum of a row's probabilities and its tail, each raised to a power."""
    whole_TK = np.concatenate([logprobs_TK, tail_T[:, None]], axis=1).astype(np.float64)
    sums_T: Float64 = np.logaddexp.reduce(power * whole_TK, axis=1)
    return sums_T.astype(np.float32)


def _shares(
    names: Sequence[str], present: Sequence[str], weight_ST: Float64, loss_S: Float64
) -> tuple[SourceShare, ...]:
    """Return every source's part in the window; `weight_ST` has the rows that are not masked."""
    weight_S = weight_ST.mean(axis=1) if weight_ST.shape[1] else np.zeros(len(present))
    measured = dict(zip(present, zip(weight_S.tolist(), loss_S.tolist(), strict=True), strict=True))
    return tuple(SourceShare(name, name in measured, *measured.get(name, (0.0, float("nan")))) for name in names)


def _log(values: Array) -> Array:
    with np.errstate(divide="ignore"):
        return cast(Array, np.log(np.maximum(values, 0)))
