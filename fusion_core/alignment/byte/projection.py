"""The byte projection: a source's next-token distributions moved into a target's vocabulary through bytes.

A source token gives its mass to the first token of its target tokenisation, then, while the target's tokens go on to
agree with it, to the next one. For a target token that starts at byte c, the source tokens in question are those of the
row that opens at c and those of earlier rows that reach beyond c (see `follow`). The realised target token gets its
exact probability, so that the sum over a window is the source's own log-likelihood.

Shape legend: S source tokens, N source rows of one chunk, V source ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from fusion_core.alignment.byte.columns import SourceRows
from fusion_core.alignment.byte.end_row import end_row
from fusion_core.alignment.byte.first_token_table import FirstTokenTable
from fusion_core.alignment.byte.window import Window
from fusion_core.alignment.checked import check_block
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.realised import finite_logprobs
from fusion_core.arrays import Float32
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary


class ByteConfig(BaseModel):
    """The settings of `byte`.

    Attributes:
        follow_tokens: follow source tokens of earlier rows that reach beyond a target boundary, so that a row is the
            source's distribution given the target tokens before it; false conditions on the last source boundary alone.
        carry_realised: give every realised token its exact probability by the chain rule. False leaves the
            probability that the mapping moved onto it, to measure the mapping by itself, and needs follow_tokens false.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["byte"] = "byte"
    follow_tokens: bool = True
    carry_realised: bool = True

    @model_validator(mode="after")
    def _following_carries(self) -> Self:
        if self.follow_tokens and not self.carry_realised:
            raise ValueError("carry_realised: false is only allowed with follow_tokens: false")
        return self


class ByteProjection:
    """The projection of blocks from one source vocabulary into one target vocabulary.

    Keep one object per pair: it remembers the first target token of every remainder it has met (4 bytes per byte of
    the source's vocabulary) and may be used from several threads.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary, config: ByteConfig | None = None) -> None:
        self.source, self.target = source, target
        self.config = config or ByteConfig()
        self._table = FirstTokenTable(source, target)

    def warm(self) -> None:
        """Look up now the tokens that the first thousands of windows would (seconds for a large vocabulary)."""
        self._table.resolve_ahead()

    def project(self, block: Block, target: Encoding) -> ProjectedRows:
        """Return the block's distributions in the target's vocabulary, one row per token of `target`.

        `target` is the target's encoding of `block.text_bytes`, with EOS behind it when the end row is wanted; that row
        is masked where the block has none. The tail of a row counts as spread evenly over the ids that are not among
        its candidates wherever the mass of a prefix is needed; with full rows that mass is exact.

        Raises:
            ValueError: a column of the block does not fit the vocabulary, or `target` belongs to another text.
        """
        check_block(block, self.source)
        text = block.without_end()
        gold_S = finite_logprobs(text.gold_T)
        source = Encoding(text.token_ids_T, text.byte_ends_T, text.mask_T)
        follows = self.config.follow_tokens
        window = Window(self._table, text.text_bytes, source, target.without_end(), follows=follows)
        probs_TK, tail_T = np.exp(text.topk_logprobs_TK), np.exp(text.tail_T.astype(np.float64))
        window.map(SourceRows(text.topk_ids_TK, probs_TK, 0), tail_T, gold_S)
        rows = window.finish(gold_S, self.config.carry_realised)
        return rows.followed_by(end_row(self._table, block)) if target.ends_document else rows

    def project_full(
        self,
        text: bytes,
        source: Encoding,
        logprob_chunks: Iterable[Float32],
        target: Encoding,
        max_entries: int | None = None,
    ) -> ProjectedRows:
        """Return rows as `project` does, from full ones: with the source's probability of every id, not only its top k.

        Args:
            text: the window, UTF-8.
            source: the source's encoding of it, one row each; end rows have no place here.
            logprob_chunks: consecutive rows in arrays [N, V] of nats, V at least the source's size (padded output
                layers may be wider). One chunk is held at a time: a few rows each keep the memory small.
            target: the target's encoding of the text.
            max_entries: most entries of a row, the largest ones and the realised token; the rest goes to the tail.

        Raises:
            ValueError: the chunks do not hold exactly one row per source token, or `target` belongs to another text.
        """
        if source.ends_document or target.ends_document:
            raise ValueError("source, target: full rows are projected for the text alone, without an end row")
        window = Window(self._table, text, source, target, follows=self.config.follow_tokens)
        gold_S = np.empty(source.num_tokens, dtype=np.float64)
        num_rows, held_NV = 0, np.empty((0, 0), dtype=np.float32)
        for logprobs_NV in logprob_chunks:
            num_new, width = logprobs_NV.shape
            if num_rows + num_new > source.num_tokens or width < self.source.size:
                raise ValueError(
                    f"logprob_chunks: expected {source.num_tokens} rows of at least {self.source.size} ids, "
                    f"got a chunk of {num_new} x {width} after {num_rows} rows"
                )
            new_N = np.arange(num_new)
            gold_S[num_rows + new_N] = finite_logprobs(logprobs_NV[new_N, source.token_ids_T[num_rows + new_N]])
            probs_NV = np.exp(logprobs_NV).astype(np.float32, copy=False)
            # Rows stay until the target token that starts in them has ended.
            held_NV = np.concatenate([held_NV, probs_NV]) if len(held_NV) else probs_NV
            first, num_rows = num_rows - len(held_NV) + num_new, num_rows + num_new
            ids_NV = np.tile(np.arange(width, dtype=np.int32), (len(held_NV), 1))
            gold_N, kept = gold_S[first:num_rows], self.target.size if max_entries is None else max_entries
            window.map(SourceRows(ids_NV, held_NV, first), np.zeros(len(held_NV)), gold_N, kept)
            held_NV = held_NV[max(0, window.first_row_needed - first) :]
        if num_rows != source.num_tokens:
            raise ValueError(f"logprob_chunks: expected {source.num_tokens} rows, got {num_rows}")
        return window.finish(gold_S, self.config.carry_realised)
