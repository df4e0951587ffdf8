"""Which source said what: per target token the sources' parts in a fused row, and why a source has no row.

Shape legend: S sources that answered, T target tokens, K candidates of a row, M entries of a target row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.arrays import Bool, Float64, Int64
from fusion_core.blocks import Block
from fusion_core.fusion.config import FusionConfig
from fusion_core.fusion.fused_block import row_weights
from fusion_core.vocabulary import Encoding

NO_BYTES = "the target's token covers no bytes of the text"
TARGET_SPELLS_OTHERWISE = "the target's tokenizer does not spell the text byte for byte here"
SOURCE_SPELLS_OTHERWISE = "the source's tokenizer does not spell the text byte for byte here"
NO_END_ROW = "the source has no row behind the end of the text"
NOT_ALIGNED = "the alignment method finds no row of the source for this token"


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The sources' parts in the fused rows of one text.

    Attributes:
        names: of the sources that answered.
        weight_ST: float64, weight of each source in the row; 0 where it has none.
        realised_ST: float64, probability that each source gives the realised token; NaN where it has no row.
        winner_T: int64, the source that gives the realised token most, by place; -1 where none has a row.
        entropy_T: float64 nats, entropy of the fused row, its tail counted as one outcome; NaN where it is masked.
        disagreement_T: float64 nats, Jensen-Shannon divergence of the sources' rows under their weights, the tail
            counted as one outcome; NaN where the fused row is masked.
        loss_T: float64 nats, -log of the realised token's fused probability; NaN where the row is masked.
        own_row_ST: int64, the row of the source's own block that opens where the target token starts, or last before.
        reasons_ST: why a source has no row; empty where it has one.
    """

    names: tuple[str, ...]
    weight_ST: Float64
    realised_ST: Float64
    winner_T: Int64
    entropy_T: Float64
    disagreement_T: Float64
    loss_T: Float64
    own_row_ST: Int64
    reasons_ST: tuple[tuple[str, ...], ...]


def attribute(
    blocks: Mapping[str, Block | None],
    rows: Mapping[str, ProjectedRows | None],
    target: Encoding,
    fused: Block,
    config: FusionConfig,
) -> Attribution:
    """Return the parts that the sources have in a fused block.

    Args:
        blocks: by source its own block; None where it gave none.
        rows: by source its rows in the target's vocabulary; None where it gave none.
        target: the target's encoding of the text.
        fused: their mixture.
        config: by which they were weighed.
    """
    present = {name: of_source for name, of_source in rows.items() if of_source is not None}
    usable_ST = np.stack([of_source.mask_T for of_source in present.values()])
    weights = row_weights(present, target, config)
    realised_ST = np.exp(np.stack([of_source.gold_T for of_source in present.values()]).astype(np.float64))
    realised_ST = np.where(usable_ST, realised_ST, np.nan)
    winner_T = np.where(usable_ST.any(axis=0), np.where(usable_ST, realised_ST, -1.0).argmax(axis=0), -1)
    own_ST, reasons_ST = [], []
    for name, of_source in present.items():
        block = blocks[name]
        assert block is not None, "rows come from a block"
        own_ST.append(_own_rows(block, target))
        reasons_ST.append(_reasons(block, of_source, target))
    masked_T = ~fused.mask_T
    fused_TK = np.exp(fused.topk_logprobs_TK.astype(np.float64))
    entropy_T = _entropy(fused_TK) + _terms(np.exp(fused.tail_T.astype(np.float64)))
    return Attribution(
        names=tuple(present),
        weight_ST=weights.of_rows_ST,
        realised_ST=realised_ST,
        winner_T=winner_T.astype(np.int64),
        entropy_T=np.where(masked_T, np.nan, entropy_T),
        disagreement_T=np.where(masked_T, np.nan, _disagreement(list(present.values()), weights.of_rows_ST)),
        loss_T=np.where(masked_T, np.nan, -fused.gold_T.astype(np.float64)),
        own_row_ST=np.stack(own_ST),
        reasons_ST=tuple(reasons_ST),
    )


def _own_rows(block: Block, target: Encoding) -> Int64:
    """Return the row of a source that predicts what is at the start of each target token."""
    ends_T = block.byte_ends_T[: block.num_text_tokens]
    starts_T = np.concatenate([[0], target.byte_ends_T[:-1]]) if target.num_tokens else np.empty(0, np.int64)
    own_T = np.searchsorted(ends_T, starts_T, side="right").astype(np.int64)
    if target.ends_document:
        own_T[-1] = block.num_tokens - 1
    return np.minimum(own_T, block.num_tokens - 1)


def _reasons(block: Block, rows: ProjectedRows, target: Encoding) -> tuple[str, ...]:
    num_text = target.num_tokens - target.ends_document
    ends_T = target.byte_ends_T.astype(np.int64)
    starts_T = np.concatenate([[0], ends_T[:-1]])[: len(ends_T)]
    source_ends_T = block.byte_ends_T[: block.num_text_tokens]
    unreadable = np.concatenate([[0], np.cumsum(~block.mask_T[: block.num_text_tokens])])
    last = len(unreadable) - 1
    first_T = np.minimum(np.searchsorted(source_ends_T, starts_T, side="right"), last)
    behind_T = np.minimum(np.searchsorted(source_ends_T, ends_T, side="left") + 1, last)
    reasons_T = np.select(
        [
            rows.mask_T,
            np.arange(target.num_tokens) >= num_text,
            ends_T == starts_T,
            ~target.lossless_T,
            unreadable[np.maximum(behind_T, first_T)] > unreadable[first_T],
        ],
        ["", NO_END_ROW, NO_BYTES, TARGET_SPELLS_OTHERWISE, SOURCE_SPELLS_OTHERWISE],
        NOT_ALIGNED,
    )
    return tuple(reasons_T.tolist())


def _disagreement(sources: list[ProjectedRows], weight_ST: Float64) -> Float64:
    """Return the entropy of the mixture minus the mean entropy of the sources' rows."""
    num_tokens = weight_ST.shape[1]
    probs = np.concatenate([s.probs_TM * w_T[:, None] for s, w_T in zip(sources, weight_ST, strict=True)], axis=1)
    ids_TM = np.concatenate([source.ids_TM for source in sources], axis=1).astype(np.int64)
    there_TM: Bool = ids_TM >= 0
    rows_N = np.broadcast_to(np.arange(num_tokens)[:, None], ids_TM.shape)[there_TM]
    keys_N = rows_N << 32 | ids_TM[there_TM]
    keys_U, place_N = np.unique(keys_N, return_inverse=True)
    mixed_U: Float64 = np.bincount(place_N, weights=probs[there_TM], minlength=len(keys_U)).astype(np.float64)
    mixed_T: Float64 = np.bincount(keys_U >> 32, weights=_terms(mixed_U), minlength=num_tokens).astype(np.float64)
    tail_ST = np.stack([source.tail_T for source in sources]).astype(np.float64)
    mixed_T = mixed_T + _terms((weight_ST * tail_ST).sum(axis=0))
    own_ST = np.stack([_entropy(source.probs_TM.astype(np.float64)) for source in sources]) + _terms(tail_ST)
    divergence_T: Float64 = np.maximum(mixed_T - (weight_ST * own_ST).sum(axis=0), 0.0)
    return divergence_T


def _entropy(probs_TM: Float64) -> Float64:
    entropy_T: Float64 = _terms(probs_TM).sum(axis=1)
    return entropy_T


def _terms(probs: Float64) -> Float64:
    """Return -p log p of each probability, 0 for 0."""
    terms: Float64 = -probs * np.log(np.where(probs > 0, probs, 1.0))
    return terms
