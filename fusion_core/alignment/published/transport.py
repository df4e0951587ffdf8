"""PTA-LLM's alignment (Zeng et al., NeurIPS 2025, arXiv 2509.17276, section 3), for comparison with `byte`.

For every pair of agreeing tokens (see `token_pairs`) the source's and the target's own top candidates are matched by
entropic optimal transport: cost is the edit distance of the decoded candidates, marginals are the two probability
vectors over the paper's window, the top 10 of either side. A source candidate becomes the target candidate that
receives the largest entry of its row, with that entry as its probability; entries that meet are added.

The marginals need equal sums: both vectors are divided by their own, and the entries are multiplied by the source's.
The mass of a row outside its largest entry joins the source's own tail, so that a row keeps summing to one. The
reference implementation applies a softmax to the entries instead, after which no token of ten can exceed 23 %.

Shape legend: S source tokens, T target tokens, P pairs, K candidates per row, M entries of a target row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fusion_core.alignment.checked import check_block, check_encoding
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.edit_distance import candidate_distances
from fusion_core.alignment.published.paired_rows import finish_rows
from fusion_core.alignment.published.pieces import common_alphabet, decode_pieces
from fusion_core.alignment.published.sinkhorn import largest_entries
from fusion_core.alignment.published.token_pairs import UNPAIRED, TokenPairs
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from fusion_core.arrays import Bool, Float32, Float64, Int32, Int64
from fusion_core.blocks import Block
from fusion_core.compiled import compiled
from fusion_core.vocabulary import Encoding, Vocabulary

_LEAST_MASS = 1e-300
_COST_OF_ENDING = 16
"""Edit distance between EOS, which has no bytes, and any other candidate: that of two long words."""


class TransportConfig(BaseModel):
    """The settings of `transport`.

    Attributes:
        match, vocabulary_map, window_tokens: which tokens are paired, as in `min_edit`.
        top_k: candidates of either side that take part, the paper's window.
        entropy_weight: w of the objective <G, C> - w H(G); the reference's `lam` of 30 is 1 / w.
        threshold: largest miss of a row's marginal in the plan.
        max_iterations: number of iterations after which the plan is taken as it is.
        carry_realised: give every realised token its exact probability, as `byte` does; a realised token outside the
            target's own candidates has none otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["transport"] = "transport"
    match: Literal["hard", "soft"] = "soft"
    vocabulary_map: VocabularyMapConfig = Field(default_factory=VocabularyMapConfig)
    window_tokens: int | None = Field(default=None, ge=1)
    top_k: int = Field(default=10, ge=1)
    entropy_weight: float = Field(default=1 / 30, ge=1e-2, allow_inf_nan=False)
    threshold: float = Field(default=1e-5, gt=0, lt=1)
    max_iterations: int = Field(default=200, ge=1)
    carry_realised: bool = True


class TransportProjection:
    """The projection of blocks from one source vocabulary into one target vocabulary. Keep one object per pair.

    Args:
        vocabulary_map: a finished map; None loads it from the cache or builds it as the config says.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        config: TransportConfig | None = None,
        vocabulary_map: VocabularyMap | None = None,
    ) -> None:
        self.source, self.target = source, target
        self.config = config or TransportConfig()
        self.vocabulary_map = vocabulary_map or VocabularyMap.load_or_build(source, target, self.config.vocabulary_map)
        self.pairs = TokenPairs(source, target, self.vocabulary_map, self.config.match, self.config.window_tokens)
        pieces = [decode_pieces(v.byte_table.bytes_B, v.byte_table.offsets_V1) for v in (source, target)]
        (self._source_pieces, self._target_pieces), self._alphabet_size = common_alphabet(*pieces)
        # Ids that can be told apart by their bytes, and EOS where both sides have one.
        self._source_comparable_V, self._target_comparable_V = (piece.lengths > 0 for piece in pieces)
        if source.eos_id is not None and target.eos_id is not None:
            self._source_comparable_V[source.eos_id] = self._target_comparable_V[target.eos_id] = True

    def project(self, block: Block, target: Encoding, target_block: Block | None = None) -> ProjectedRows:
        """Return the block's distributions in the target's vocabulary, one row per token of `target`.

        Args:
            target_block: the target model's own distributions over the same tokens, which this method needs.

        Raises:
            ValueError: a block belongs to another vocabulary or to another text, or the target's own is missing.
        """
        check_block(block, self.source)
        check_encoding(target, self.target, len(block.text_bytes))
        if target_block is None:
            raise ValueError("target_block: transport needs the target's own distributions, add it to the sources")
        check_block(target_block, self.target)
        check_encoding(target, self.target, len(target_block.text_bytes))
        if target.ends_document and not target_block.ends_document:
            text_rows = self.project(block, target.without_end(), target_block)
            return text_rows.followed_by(ProjectedRows.masked())
        if not target.ends_document:
            block, target_block = block.without_end(), target_block.without_end()
        if not np.array_equal(target_block.token_ids_T, target.token_ids_T):
            raise ValueError("target_block: its tokens are not those of the target's encoding")
        source_of_T = self.pairs.source_of(block, target)
        usable_T = target.lossless_T & target_block.mask_T
        if block.num_tokens:
            usable_T &= block.mask_T[source_of_T]
        source_of_T = np.where(usable_T, source_of_T, np.int32(UNPAIRED))
        rows = self._transported(block, target_block, source_of_T)
        return finish_rows(block, target, source_of_T, *rows, carry=self.config.carry_realised)

    def _transported(self, block: Block, target_block: Block, source_of_T: Int32) -> tuple[Int32, Float32, Float64]:
        """Return (ids_TM, probs_TM, tail_T), M = top_k + 1 with the last place free; unpaired rows are empty."""
        targets_P = np.flatnonzero(source_of_T != UNPAIRED)
        top_k = self.config.top_k
        source_ids_PK, source_PK, mass_P = _marginals(block, source_of_T[targets_P], self._source_comparable_V, top_k)
        target_ids_PK, target_PK, _ = _marginals(target_block, targets_P, self._target_comparable_V, top_k)
        costs_PKK = candidate_distances(
            self._source_pieces, source_ids_PK, self._target_pieces, target_ids_PK, self._alphabet_size
        )
        source_ends_PK1 = source_ids_PK[:, :, None] == self.source.eos_id
        target_ends_P1K = target_ids_PK[:, None, :] == self.target.eos_id
        costs_PKK[source_ends_PK1 ^ target_ends_P1K] = _COST_OF_ENDING
        config = self.config
        column_PK, entry_PK, _ = largest_entries(
            costs_PKK, source_PK, target_PK, config.entropy_weight, config.threshold, config.max_iterations
        )
        ids_TM = np.full((len(source_of_T), target_ids_PK.shape[1] + 1), -1, np.int32)
        probs_TM = np.zeros(ids_TM.shape, np.float32)
        tail_T = np.ones(len(source_of_T))
        _collect(column_PK, entry_PK * mass_P[:, None], target_ids_PK, targets_P, ids_TM, probs_TM, tail_T)
        return ids_TM, probs_TM, tail_T


def _marginals(block: Block, rows_P: Int32 | Int64, comparable_V: Bool, top_k: int) -> tuple[Int32, Float64, Float64]:
    """Return (ids_PK, probs_PK, mass_P): the rows' first candidates, their probabilities scaled to sum 1, and the sum.

    Candidates that cannot be compared (control tokens, padded output layers) are left out: id -1, probability 0.
    """
    logprobs_PK = block.topk_logprobs_TK[rows_P].astype(np.float64)
    ids_PK = block.topk_ids_TK[rows_P, :top_k].copy()
    known_PK = (ids_PK >= 0) & (ids_PK < len(comparable_V))
    known_PK &= comparable_V[np.where(known_PK, ids_PK, 0)]
    ids_PK[~known_PK] = -1
    probs_PK = np.where(known_PK, np.exp(logprobs_PK[:, :top_k]), 0.0)
    mass_P = probs_PK.sum(axis=1)
    # Rows that came over the wire are rounded, and need not sum to one exactly.
    all_P = np.exp(logprobs_PK).sum(axis=1) + np.exp(block.tail_T[rows_P].astype(np.float64))
    return ids_PK, probs_PK / np.maximum(mass_P, _LEAST_MASS)[:, None], mass_P / np.maximum(all_P, _LEAST_MASS)


@compiled
def _collect(
    column_PK: Int64,
    entry_PK: Float64,
    target_ids_PK: Int32,
    targets_P: Int64,
    ids_TM: Int32,
    probs_TM: Float32,
    tail_T: Float64,
) -> None:
    """Add the entries that meet in one target candidate, in the order of the target's candidates."""
    sums = np.empty(target_ids_PK.shape[1], np.float64)
    for p in range(targets_P.shape[0]):
        sums[:] = 0.0
        for k in range(column_PK.shape[1]):
            if column_PK[p, k] >= 0:
                sums[column_PK[p, k]] += entry_PK[p, k]
        used, total = 0, 0.0
        for column in range(sums.shape[0]):
            if sums[column] > 0:
                ids_TM[targets_P[p], used] = target_ids_PK[p, column]
                probs_TM[targets_P[p], used] = sums[column]
                used += 1
                total += sums[column]
        tail_T[targets_P[p]] = max(0.0, 1.0 - total)
