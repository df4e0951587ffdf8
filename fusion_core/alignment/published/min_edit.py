"""FuseLLM's alignment (Wan et al., ICLR 2024, section 3.2) with its shift corrected, for comparison with `byte`.

A target token that is paired one to one with an agreeing source token takes that token's row: its candidates go
through the vocabulary map, probabilities that meet in one target token are added, those that map nowhere join the tail.
Row t predicts token t on both sides, so the match is tested on the predicted tokens. All other rows are masked.

`published_fallback` restores the behaviour of the reference implementation, whose rows predict the token after: the
match is tested on the token before the predicted one, and rows without a match predict that token once more.

Shape legend: S source tokens, T target tokens, K candidates per source row, V source ids.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusion_core.alignment.checked import check_block, check_encoding
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.published.paired_rows import finish_rows
from fusion_core.alignment.published.token_pairs import UNPAIRED, TokenPairs
from fusion_core.alignment.published.vocabulary_map import VocabularyMap, VocabularyMapConfig
from fusion_core.arrays import Float32, Float64, Int32
from fusion_core.blocks import Block
from fusion_core.compiled import compiled
from fusion_core.sparse_row import num_slots, place_of
from fusion_core.vocabulary import Encoding, Vocabulary


class MinEditConfig(BaseModel):
    """The settings of `min_edit`.

    Attributes:
        match: `hard`: paired tokens agree when their bytes are equal; `soft`: also when the vocabulary map sends the
            source token to the target token.
        vocabulary_map: the map from candidates to target ids. The paper's `hard` goes with strategy `exact`, its `soft`
            with `min_edit` or `co_occurrence`.
        window_tokens: align windows of about this many target tokens; null aligns the whole sequence at once.
        carry_realised: give every realised token its exact probability, as `byte` does.
        published_fallback: the rows of the reference implementation, for comparison only; nothing is carried then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["min_edit"] = "min_edit"
    match: Literal["hard", "soft"] = "soft"
    vocabulary_map: VocabularyMapConfig = Field(default_factory=VocabularyMapConfig)
    window_tokens: int | None = Field(default=None, ge=1)
    carry_realised: bool = True
    published_fallback: bool = False

    @model_validator(mode="after")
    def _nothing_carried_into_published_rows(self) -> Self:
        if self.published_fallback and self.carry_realised and "carry_realised" in self.model_fields_set:
            raise ValueError("carry_realised: must be false with published_fallback, whose rows carry nothing")
        return self


class MinEditProjection:
    """The projection of blocks from one source vocabulary into one target vocabulary. Keep one object per pair.

    Args:
        vocabulary_map: a finished map; None loads it from the cache or builds it as the config says.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        config: MinEditConfig | None = None,
        vocabulary_map: VocabularyMap | None = None,
    ) -> None:
        self.source, self.target = source, target
        self.config = config or MinEditConfig()
        self.vocabulary_map = vocabulary_map or VocabularyMap.load_or_build(source, target, self.config.vocabulary_map)
        self.pairs = TokenPairs(source, target, self.vocabulary_map, self.config.match, self.config.window_tokens)

    def project(self, block: Block, target: Encoding) -> ProjectedRows:
        """Return the block's distributions in the target's vocabulary, one row per token of `target`.

        Raises:
            ValueError: the block belongs to another vocabulary, or `target` to another text.
        """
        check_block(block, self.source)
        check_encoding(target, self.target, len(block.text_bytes))
        if not target.ends_document:
            block = block.without_end()
        if self.config.published_fallback:
            return self._project_as_published(block, target)
        source_of_T = self.pairs.source_of(block, target)
        usable_T = target.lossless_T & block.mask_T[source_of_T] if block.num_tokens else target.lossless_T
        source_of_T = np.where(usable_T, source_of_T, np.int32(UNPAIRED))
        rows = map_rows(block, source_of_T, self.vocabulary_map.target_ids_V)
        return finish_rows(block, target, source_of_T, *rows, carry=self.config.carry_realised)

    def _project_as_published(self, block: Block, target: Encoding) -> ProjectedRows:
        """Return rows in which row t is the reference's row t - 1; the first row and the end row are empty."""
        if target.ends_document:
            rows = self._project_as_published(block.without_end(), target.without_end())
            return rows.followed_by(ProjectedRows.masked())
        row_of_T = np.full(target.num_tokens, UNPAIRED, np.int32)
        context_of_T = self.pairs.source_of(block, target, shared=True)[:-1]
        row_of_T[1:] = np.where(context_of_T >= 0, context_of_T + 1, UNPAIRED)
        row_of_T[row_of_T == block.num_tokens] = UNPAIRED
        ids_TM, probs_TM, tail_T = map_rows(block, row_of_T, self.vocabulary_map.target_ids_V)
        fallback_T = np.flatnonzero(row_of_T == UNPAIRED)[1:]
        ids_TM[fallback_T, 0] = target.token_ids_T[fallback_T - 1]
        probs_TM[fallback_T, 0], tail_T[fallback_T] = 1.0, 0.0
        filled_T = np.where(target.lossless_T, np.int32(0), np.int32(UNPAIRED))
        filled_T[:1] = UNPAIRED
        return finish_rows(block, target, filled_T, ids_TM, probs_TM, tail_T, carry=False)


def map_rows(block: Block, row_of_T: Int32, target_ids_V: Int32) -> tuple[Int32, Float32, Float64]:
    """Return the candidates of the chosen source rows in target ids: (ids_TM, probs_TM, tail_T), M = K + 1.

    Rows and tail sum to one; the last place is free, and rows of -1 are empty with all mass in the tail.
    """
    return _map_rows(
        block.topk_ids_TK,
        np.exp(block.topk_logprobs_TK.astype(np.float64)),
        np.exp(block.tail_T.astype(np.float64)),
        row_of_T,
        target_ids_V,
    )


@compiled
def _map_rows(
    ids_SK: Int32, probs_SK: Float64, tail_S: Float64, row_of_T: Int32, target_ids_V: Int32
) -> tuple[Int32, Float32, Float64]:
    num_targets, width = row_of_T.shape[0], ids_SK.shape[1] + 1
    ids_TM = np.full((num_targets, width), -1, np.int32)
    probs_TM = np.zeros((num_targets, width), np.float32)
    tail_T = np.ones(num_targets, np.float64)
    sums = np.empty(width, np.float64)
    keys = np.full(num_slots(width), -1, np.int64)
    places = np.empty(keys.shape[0], np.int32)
    for t in range(num_targets):
        s = row_of_T[t]
        if s < 0:
            continue
        used, tail = 0, tail_S[s]
        for k in range(ids_SK.shape[1]):
            token = ids_SK[s, k]
            if token < 0:
                continue
            # Padded output layers have more ids than the tokenizer.
            mapped = int(target_ids_V[token]) if token < target_ids_V.shape[0] else -1
            if mapped < 0:
                tail += probs_SK[s, k]
                continue
            place = place_of(keys, places, t, mapped, used)
            if place == used:
                ids_TM[t, place] = mapped
                sums[place] = 0.0
                used += 1
            sums[place] += probs_SK[s, k]
        mass = tail + sums[:used].sum()
        if mass <= 0.0:  # a row without any mass predicts nothing
            tail = mass = 1.0
        for place in range(used):
            probs_TM[t, place] = sums[place] / mass
        tail_T[t] = tail / mass
    return ids_TM, probs_TM, tail_T
