"""One text in both tokenisations, and the rows of one model moved from the one to the other.

Shape legend: R rows of the source that the caller holds, S source tokens, T target tokens, K candidates of a source
row, M entries of a target row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_core.alignment.byte_kernels import carry_realised, project_rows, tokens_match
from fusion_core.alignment.first_token_table import FirstTokenTable
from fusion_core.alignment.projected import ProjectedRows
from fusion_core.vocabulary import Encoding

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

_LOWEST_LOGPROB = -1e4
"""Stands in for a realised token of probability zero, so that differences of sums stay numbers."""
_PENDING = 1 << 14


class SourceRows(NamedTuple):
    """Consecutive source rows, as probabilities."""

    ids_RK: Int32
    probs_RK: Float32
    tail_R: Float64
    gold_R: Float64


class MappedRows(NamedTuple):
    """Mapped rows of consecutive target tokens; every row has a free place behind its entries."""

    ids_TM: Int32
    probs_TM: Float32
    tail_T: Float64

    def cut(self, max_entries: int, target_ids_T: Int32) -> MappedRows:
        """Keeps the largest `max_entries` entries of every row and the realised token's, the rest goes to the tail."""
        width = int((self.ids_TM >= 0).sum(axis=1).max(initial=0))
        if width <= max_entries:
            return MappedRows(self.ids_TM[:, : width + 1].copy(), self.probs_TM[:, : width + 1].copy(), self.tail_T)
        realised_TM = self.ids_TM == target_ids_T[:, None]
        kept = max_entries + 1
        order_TM = np.argsort(-np.where(realised_TM, np.inf, self.probs_TM), axis=1, kind="stable")[:, :kept]
        ids_TM = np.full((len(order_TM), kept + 1), -1, dtype=np.int32)
        probs_TM = np.zeros(ids_TM.shape, dtype=np.float32)
        ids_TM[:, :kept] = np.take_along_axis(self.ids_TM, order_TM, axis=1)
        probs_TM[:, :kept] = np.take_along_axis(self.probs_TM, order_TM, axis=1)
        without_T = ~realised_TM.any(axis=1)
        ids_TM[without_T, max_entries], probs_TM[without_T, max_entries] = -1, 0.0
        lost_T = self.probs_TM.sum(axis=1, dtype=np.float64) - probs_TM.sum(axis=1, dtype=np.float64)
        return MappedRows(ids_TM, probs_TM, self.tail_T + np.maximum(lost_T, 0.0))


def join(parts: list[MappedRows]) -> MappedRows:
    """The parts below each other, padded to one width."""
    if len(parts) == 1:
        return parts[0]
    width = max((part.ids_TM.shape[1] for part in parts), default=1)
    ids_TM = np.full((sum(len(part.ids_TM) for part in parts), width), -1, dtype=np.int32)
    probs_TM = np.zeros(ids_TM.shape, dtype=np.float32)
    first = 0
    for part in parts:
        place = np.s_[first : first + part.ids_TM.shape[0], : part.ids_TM.shape[1]]
        ids_TM[place], probs_TM[place] = part.ids_TM, part.probs_TM
        first += part.ids_TM.shape[0]
    return MappedRows(ids_TM, probs_TM, np.concatenate([part.tail_T for part in parts] or [np.zeros(0)]))


class Window:
    """One text in both tokenisations, in the source's byte positions.

    A source with a dummy prefix reads " text": its positions are shifted by that one virtual byte, and a target
    without dummy prefix starts behind it, where the source's first row is conditioned on the space.
    """

    def __init__(
        self, table: FirstTokenTable, text: bytes, ids_S: Int32, ends_S: Int32, usable_S: Bool, target: Encoding
    ) -> None:
        for name, ends in (("source", ends_S), ("target", target.byte_ends_T)):
            if (int(ends[-1]) if len(ends) else 0) != len(text) or np.any(np.diff(ends, prepend=0) < 0):
                raise ValueError(f"{name}: byte_ends must rise from 0 to the text's {len(text)} bytes")
        self.table, self.target, self.ids_S = table, target, ids_S
        source = table.source
        source_virtual = source.num_virtual_bytes(ids_S, ends_S)
        target_virtual = table.target.num_virtual_bytes(target.token_ids_T, target.byte_ends_T)
        text_N = np.frombuffer(text, dtype=np.uint8)
        match_S = tokens_match(source.blob_B, source.offsets_V1, ids_S, ends_S, text_N, source_virtual)
        self.usable_S = usable_S & match_S

        self.source_starts_S: Int64 = np.zeros(len(ids_S), dtype=np.int64)
        self.source_starts_S[1:] = ends_S[:-1] + source_virtual
        ends_T = target.byte_ends_T.astype(np.int64) + source_virtual
        self.starts_T: Int64 = np.empty_like(ends_T)
        self.starts_T[1:] = ends_T[:-1]
        self.starts_T[:1] = source_virtual - min(source_virtual, target_virtual)
        self.at_start_T: Bool = np.zeros(len(ends_T), dtype=np.bool_)
        self.at_start_T[:1] = target_virtual > source_virtual
        self.row_of_T: Int64 = np.searchsorted(self.source_starts_S, self.starts_T, side="right") - 1
        inside_T = self.starts_T > self.source_starts_S[self.row_of_T]
        last_row_of_T = np.searchsorted(self.source_starts_S, ends_T, side="left") - 1
        num_unusable = np.concatenate([[0], np.cumsum(~self.usable_S)])
        self.mask_T: Bool = (
            target.lossless_T
            & (ends_T > self.starts_T)
            & (num_unusable[np.maximum(last_row_of_T, self.row_of_T) + 1] == num_unusable[self.row_of_T])
        )
        # A masked token's start still decides how much of the source's loss falls to the token before it.
        self.wanted_T: Bool = self.usable_S[self.row_of_T] & (self.mask_T | inside_T)
        self.log_prefix_mass_T: Float64 = np.zeros(len(ends_T), dtype=np.float64)

    def map(self, rows: SourceRows, first_row: int, max_entries: int | None = None) -> MappedRows:
        """The target tokens that start in the given source rows, the first of which is row `first_row`."""
        source, table = self.table.source, self.table
        num_rows, k = rows.ids_RK.shape
        low, high = np.searchsorted(self.row_of_T, [first_row, first_row + num_rows])
        tokens = slice(int(low), int(high))
        width = min(k + 1, table.target.size) + 1
        pending_P = np.empty(_PENDING, dtype=np.int64)
        while True:
            part = MappedRows(
                np.full((high - low, width), -1, dtype=np.int32),
                np.zeros((high - low, width), dtype=np.float32),
                np.zeros(high - low, dtype=np.float64),
            )
            num_pending = project_rows(
                *rows,
                first_row,
                self.ids_S,
                self.source_starts_S,
                source.offsets_V1,
                source.rank_V,
                source.prefix_low_B,
                source.prefix_high_B,
                table.values,
                self.row_of_T[tokens],
                self.starts_T[tokens],
                self.at_start_T[tokens],
                self.wanted_T[tokens],
                *part,
                self.log_prefix_mass_T[tokens],
                pending_P,
            )
            if num_pending == 0:
                return part if max_entries is None else part.cut(max_entries, self.target.token_ids_T[tokens])
            table.resolve(pending_P[:num_pending])

    def finish(self, parts: list[MappedRows], gold_S: Float64, carry: bool) -> ProjectedRows:
        """Joins the parts; with `carry` puts the realised tokens' exact probabilities in."""
        mask_T = self.mask_T & self.wanted_T
        ids_TM, probs_TM, tail_T = join(parts)
        covered_T = np.where(mask_T, 1.0 - tail_T, 0.0).astype(np.float32)
        gold_T = np.minimum(np.diff(self._logprob_at_boundaries(gold_S)), 0.0)
        if carry:
            carry_realised(self.target.token_ids_T, gold_T, mask_T, ids_TM, probs_TM, tail_T)
        else:
            ids_TM[~mask_T], probs_TM[~mask_T], tail_T[~mask_T] = -1, 0.0, 1.0
            realised_TM = ids_TM == self.target.token_ids_T[:, None]
            with np.errstate(divide="ignore"):
                mapped_T = np.log(np.where(realised_TM, probs_TM, 0.0).sum(axis=1, dtype=np.float64))
            gold_T = np.where(mask_T, np.minimum(mapped_T, 0.0), gold_T)
        return ProjectedRows(
            ids_TM=ids_TM,
            probs_TM=probs_TM,
            tail_T=tail_T.astype(np.float32),
            gold_T=gold_T.astype(np.float32),
            mask_T=mask_T,
            covered_T=covered_T,
        )

    def _logprob_at_boundaries(self, gold_S: Float64) -> Float64:
        """The source's log-probability of the text up to the start of every target token, and of all of it."""
        gold_S = np.maximum(gold_S, _LOWEST_LOGPROB)
        until_S1 = np.concatenate([[0.0], np.cumsum(gold_S)])
        inside_T = self.starts_T > self.source_starts_S[self.row_of_T]
        # Within a source token that cannot be read as bytes, its loss is charged where the token starts.
        unreadable_T = inside_T & ~self.usable_S[self.row_of_T]
        within_T = np.where(
            unreadable_T,
            gold_S[self.row_of_T],
            np.where(inside_T, np.maximum(self.log_prefix_mass_T, _LOWEST_LOGPROB), 0.0),
        )
        return np.append(until_S1[self.row_of_T] + within_T, until_S1[-1])
