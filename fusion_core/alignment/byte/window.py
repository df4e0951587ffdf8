"""One text in both tokenisations, and the rows of the source moved into the target's.

Shape legend: R rows of the source that the caller holds, S source tokens, T target tokens, K candidates of a source
row, M entries of a target row.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.byte.columns import (
    SOURCE_TOKEN,
    TARGET_TOKEN,
    MappedRows,
    SourceRows,
    SourceTables,
    TextInBoth,
)
from fusion_core.alignment.byte.first_token_table import FirstTokenTable
from fusion_core.alignment.byte.follow import map_target_tokens
from fusion_core.alignment.byte.hypotheses import Hypotheses
from fusion_core.alignment.byte.tokens_match import place_sources, place_targets
from fusion_core.alignment.checked import check_byte_ends, check_encoding
from fusion_core.alignment.projected_rows import ProjectedRows
from fusion_core.alignment.realised import carry_realised, finite_logprobs
from fusion_core.arrays import Bool, Float64, Int32
from fusion_core.vocabulary import Encoding

_PENDING = 1 << 14
_ENTRIES_FOR_EARLIER_ROWS = 16
"""Entries of a row beyond its K candidates, for source tokens of earlier rows; the smallest go to the tail."""


class Window:
    """One text in both tokenisations, in the source's byte positions, target token by target token.

    A source with a dummy prefix reads " text": its positions are shifted by that one virtual byte, and a target
    without dummy prefix starts behind it, where the source's first row is conditioned on the space.
    """

    def __init__(
        self,
        table: FirstTokenTable,
        text: bytes,
        source: Encoding,
        target: Encoding,
        *,
        follows: bool,
    ) -> None:
        check_byte_ends("source: byte_ends", source.byte_ends_T, len(text))
        check_encoding(target, table.target, len(text))
        self._table, self._target, self._follows = table, target, follows
        shift = table.source.num_virtual_bytes(source.token_ids_T, source.byte_ends_T)
        target_shift = table.target.num_virtual_bytes(target.token_ids_T, target.byte_ends_T)
        text_N = np.frombuffer(b" " * shift + text, dtype=np.uint8)
        self._sources_S = np.zeros(source.num_tokens, dtype=SOURCE_TOKEN)
        self._targets_T = np.zeros(target.num_tokens, dtype=TARGET_TOKEN)
        place_sources(
            table.source.byte_table.bytes_B,
            table.source.byte_table.offsets_V1,
            text_N,
            source.token_ids_T,
            source.byte_ends_T,
            source.lossless_T,
            shift,
            self._sources_S,
        )
        place_targets(
            target.token_ids_T,
            target.byte_ends_T,
            target.lossless_T,
            shift,
            max(0, shift - target_shift),
            self._sources_S,
            self._targets_T,
        )
        self._targets_T["at_start"][:1] = target_shift > shift
        self.mask_T: Bool = self._targets_T["wanted"].copy()
        self._text_N = text_N
        self._hypotheses: Hypotheses | None = None
        self._parts: list[MappedRows] = []
        self.num_done = 0

    @property
    def first_row_needed(self) -> int:
        """The first source row that the next target token needs; behind the last row when all are done."""
        if self.num_done == len(self._targets_T):
            return len(self._sources_S)
        return int(self._targets_T["row"][self.num_done])

    def map(self, rows: SourceRows, tail_R: Float64, gold_R: Float64, max_entries: int | None = None) -> None:
        """Map the next target tokens, as far as the given source rows reach.

        Args:
            rows: consecutive rows, of which the first must not be behind `first_row_needed`.
            tail_R: the probability outside their candidates.
            gold_R: log-probabilities of their realised tokens, finite.
            max_entries: number of largest entries of a target row that are kept, beside the realised one.
        """
        num_rows, k = rows.ids_RK.shape
        held = self._sources_S[rows.first_row : rows.first_row + num_rows]
        held["tail"], held["gold"], held["log_gold"] = tail_R, np.exp(gold_R), gold_R
        done = int(np.searchsorted(self._targets_T["last_row"], rows.first_row + num_rows))
        targets_T = self._targets_T[self.num_done : done]
        text = TextInBoth(self._text_N, self._sources_S, targets_T)
        if self._hypotheses is None:
            self._hypotheses = Hypotheses.none(room=4 * (k + 1) + 64)
        source, table = self._table.source, self._table
        if self._follows:
            table.resolve_whole_tokens()
        num_first_U = table.num_first_U if table.num_first_U is not None else np.empty(0, dtype=np.int32)
        tables = SourceTables(
            source.byte_table.bytes_B,
            source.byte_table.offsets_V1,
            source.byte_table.prefix_low_B,
            source.byte_table.prefix_high_B,
            source.byte_table.rank_V,
            table.values,
            num_first_U,
        )
        num_tokens, width = done - self.num_done, min(k + 1 + _ENTRIES_FOR_EARLIER_ROWS, table.target.size) + 1
        pending_P = np.empty(_PENDING, dtype=np.int64)
        while True:
            part = MappedRows(
                np.full((num_tokens, width), -1, dtype=np.int32),
                np.zeros((num_tokens, width), dtype=np.float32),
                np.ones(num_tokens, dtype=np.float64),
                np.zeros(num_tokens, dtype=np.float64),
                np.zeros(num_tokens, dtype=np.float32),
            )
            after = self._hypotheses.copy()
            num_pending = (
                map_target_tokens(rows, tables, text, after, self._follows, part, pending_P)
                if len(self._sources_S)
                else 0
            )
            if num_pending == 0:
                break
            table.resolve(pending_P[:num_pending])
        self._hypotheses, self.num_done = after, done
        self._parts.append(part if max_entries is None else _cut(part, max_entries, targets_T["id"]))

    def finish(self, gold_S: Float64, carry: bool) -> ProjectedRows:
        """Return the rows of all target tokens; with `carry` the realised tokens have their exact probabilities."""
        part = _join(self._parts)
        ids_TM, probs_TM, tail_T = part.ids_TM, part.probs_TM, part.tail_T
        gold_T = np.minimum(np.diff(self._logprob_at_boundaries(gold_S, part.log_mass_T)), 0.0)
        if carry and not self._follows:
            carry_realised(self._target.token_ids_T, gold_T, self.mask_T, ids_TM, probs_TM, tail_T)
        if not carry:
            realised_TM = ids_TM == self._target.token_ids_T[:, None]
            mapped_T = np.where(realised_TM, probs_TM, 0.0).sum(axis=1, dtype=np.float64)
            with np.errstate(divide="ignore"):
                gold_T = np.where(self.mask_T, finite_logprobs(np.log(mapped_T)), gold_T)
        return ProjectedRows(
            ids_TM=ids_TM,
            probs_TM=probs_TM,
            tail_T=tail_T.astype(np.float32),
            gold_T=gold_T.astype(np.float32),
            mask_T=self.mask_T,
            covered_T=part.covered_T,
        )

    def _logprob_at_boundaries(self, gold_S: Float64, log_mass_T: Float64) -> Float64:
        """Return the source's log-probability of the text up to the start of every target token, and of all of it."""
        sources_S, starts_T, row_T = self._sources_S, self._targets_T["start"], self._targets_T["row"]
        until_S1 = np.concatenate([[0.0], np.cumsum(gold_S)])
        if not len(sources_S):
            return np.zeros(len(starts_T) + 1)
        # Within a source token that cannot be read as bytes, its loss is charged where the token starts.
        inside_T = starts_T > sources_S["start"][row_T]
        at_end_T = starts_T == sources_S["end"][-1]
        whole_T = inside_T & (at_end_T | ~sources_S["readable"][row_T])
        return np.append(until_S1[row_T] + np.where(whole_T, gold_S[row_T], log_mass_T), until_S1[-1])


def _cut(part: MappedRows, max_entries: int, target_ids_T: Int32) -> MappedRows:
    """Keep the largest `max_entries` entries of every row and the realised token's; the rest goes to the tail."""
    width = int((part.ids_TM >= 0).sum(axis=1).max(initial=0))
    if width <= max_entries:
        return part._replace(ids_TM=part.ids_TM[:, : width + 1].copy(), probs_TM=part.probs_TM[:, : width + 1].copy())
    realised_TM = part.ids_TM == target_ids_T[:, None]
    kept = max_entries + 1
    order_TM = np.argsort(-np.where(realised_TM, np.inf, part.probs_TM), axis=1, kind="stable")[:, :kept]
    ids_TM = np.full((len(order_TM), kept + 1), -1, dtype=np.int32)
    probs_TM = np.zeros(ids_TM.shape, dtype=np.float32)
    ids_TM[:, :kept] = np.take_along_axis(part.ids_TM, order_TM, axis=1)
    probs_TM[:, :kept] = np.take_along_axis(part.probs_TM, order_TM, axis=1)
    without_T = ~realised_TM.any(axis=1)
    ids_TM[without_T, max_entries], probs_TM[without_T, max_entries] = -1, 0.0
    lost_T = part.probs_TM.sum(axis=1, dtype=np.float64) - probs_TM.sum(axis=1, dtype=np.float64)
    return part._replace(ids_TM=ids_TM, probs_TM=probs_TM, tail_T=part.tail_T + np.maximum(lost_T, 0.0))


def _join(parts: list[MappedRows]) -> MappedRows:
    """Return the parts below each other, padded to one width."""
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
    columns = [np.concatenate([part[i] for part in parts]) if parts else np.zeros(0) for i in (2, 3, 4)]
    return MappedRows(ids_TM, probs_TM, columns[0], columns[1], columns[2].astype(np.float32))
