"""The byte projection: a source's next-token distributions moved into a target's vocabulary through bytes.

For a target token that starts at byte c, let b <= c be the last boundary of a source token and r = text[b:c]. The
source's row at b is restricted to tokens that start with r, r is stripped, and every remainder's mass goes to the
first token of the remainder's target tokenisation. The realised target token gets its exact probability by the chain
rule over the source tokens that cover it, so that the sum over a window is the source's own log-likelihood.

Shape legend: S source tokens, T target tokens, K candidates of a source row, M entries of a target row, V source ids.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_core.alignment.byte_kernels import UNKNOWN, carry_realised, project_rows, tokens_match
from fusion_core.alignment.projected import ProjectedRows
from fusion_core.blocks import Block
from fusion_core.vocabulary import Encoding, Vocabulary

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

_LOWEST_LOGPROB = -1e4
"""Stands in for a realised token of probability zero, so that differences of sums stay numbers."""
_PENDING = 1 << 14


class ByteProjection:
    """Projects blocks of one source vocabulary into one target vocabulary.

    Keep one object per pair: it remembers the first target token of every remainder it has met (4 bytes per byte of
    the source's vocabulary) and may be used from several threads.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self.source, self.target = source, target
        self.identity = source.fingerprint == target.fingerprint
        # First target token by key, one table: [0, V) a whole source token; [V, 2V) the same after the target's dummy
        # prefix, for the start of a text; 2V + p the rest of a source token from position p of the source's blob.
        table = np.full(2 * source.size + len(source.blob_B), UNKNOWN, dtype=np.int32)
        without_bytes_V = source.offsets_V1[1:] == source.offsets_V1[:-1]
        table[: source.size][without_bytes_V] = -1
        table[source.size : 2 * source.size][without_bytes_V] = -1
        if self.identity:
            table[: source.size] = np.arange(source.size)
        elif source.eos_id is not None and target.eos_id is not None:
            table[source.eos_id] = table[source.size + source.eos_id] = target.eos_id
        self.first_table: Int32 = table
        self._lock = threading.Lock()

    def project(self, block: Block, target: Encoding) -> ProjectedRows:
        """The block's distributions in the target's vocabulary, one row per token of `target`.

        `target` is the target's encoding of `block.text_bytes`. The tail of a row counts as spread evenly over the ids
        that are not among its candidates wherever the mass of a prefix is needed; with full rows that mass is exact.

        Raises:
            ValueError: the block belongs to another vocabulary, or `target` to another text.
        """
        if block.vocabulary != self.source.fingerprint:
            raise ValueError(
                f"vocabulary: the block's fingerprint is {block.vocabulary}, expected {self.source.fingerprint}"
            )
        gold_S = block.gold_T.astype(np.float64)
        rows = _Rows(
            block.topk_ids_TK, np.exp(block.topk_logprobs_TK), np.exp(block.tail_T.astype(np.float64)), np.exp(gold_S)
        )
        window = _Window(self, block.text_bytes, block.token_ids_T, block.byte_ends_T, block.mask_T, target)
        return window.finish([window.map(rows, 0)], gold_S)

    def project_full(
        self,
        text: bytes,
        source: Encoding,
        logprob_chunks: Iterable[Float32],
        target: Encoding,
        max_entries: int | None = None,
    ) -> ProjectedRows:
        """As `project`, from full rows: what a source says about every id, not only its top k.

        Args:
            text: the window, UTF-8.
            source: the source's encoding of it, one row each.
            logprob_chunks: consecutive rows in arrays [N, V] of nats, V at least the source's size (padded output
                layers may be wider). One chunk is held at a time: a few rows each keep the memory small.
            target: the target's encoding of the text.
            max_entries: keep only that many largest entries of a row (and the realised token), the rest in the tail.

        Raises:
            ValueError: the chunks do not hold exactly one row per source token, or `target` belongs to another text.
        """
        window = _Window(self, text, source.token_ids_T, source.byte_ends_T, source.lossless_T, target)
        gold_S = np.empty(source.num_tokens, dtype=np.float64)
        first = 0
        parts: list[_Part] = []
        for logprobs_NV in logprob_chunks:
            num_rows, width = logprobs_NV.shape
            if first + num_rows > source.num_tokens or width < self.source.size:
                raise ValueError(
                    f"logprob_chunks: expected {source.num_tokens} rows of at least {self.source.size} ids, "
                    f"got a chunk of {num_rows} x {width} after {first} rows"
                )
            realised_N = source.token_ids_T[first : first + num_rows]
            gold_N = logprobs_NV[np.arange(num_rows), realised_N].astype(np.float64)
            gold_S[first : first + num_rows] = gold_N
            ids_NV = np.tile(np.arange(width, dtype=np.int32), (num_rows, 1))
            probs_NV = np.exp(logprobs_NV).astype(np.float32, copy=False)
            part = window.map(_Rows(ids_NV, probs_NV, np.zeros(num_rows), np.exp(gold_N)), first)
            parts.append(part.cut(max_entries))
            first += num_rows
        if first != source.num_tokens:
            raise ValueError(f"logprob_chunks: expected {source.num_tokens} rows, got {first}")
        return window.finish(parts, gold_S)

    def resolve(self, keys: Int64) -> None:
        """Looks up the first target token of every key of the table that is not known yet."""
        with self._lock:
            keys = np.unique(keys)
            keys = keys[self.first_table[keys] == UNKNOWN]
            remainders = [self._remainder(int(key)) for key in keys]
            distinct = list(dict.fromkeys(remainders))
            first_of = dict(zip(distinct, self.target.first_tokens(distinct).tolist(), strict=True))
            self.first_table[keys] = [first_of[remainder] for remainder in remainders]

    def warm(self) -> None:
        """Looks up every whole source token in advance, so that the first windows run at full speed."""
        self.resolve(np.arange(self.source.size, dtype=np.int64))

    def _remainder(self, key: int) -> bytes:
        size = self.source.size
        if key < size:
            return self.source.token_bytes(key)
        if key < 2 * size:
            return b" " + self.source.token_bytes(key - size)
        position = key - 2 * size
        token = int(np.searchsorted(self.source.offsets_V1, position, side="right")) - 1
        return self.source.blob_B[position : self.source.offsets_V1[token + 1]].tobytes()


class _Rows(NamedTuple):
    """Consecutive source rows, as probabilities."""

    ids_RK: Int32
    probs_RK: Float32
    tail_R: Float64
    gold_R: Float64


class _Part(NamedTuple):
    """Mapped rows of consecutive target tokens; every row has a free place behind its entries."""

    ids_TM: Int32
    probs_TM: Float32
    tail_T: Float64

    def cut(self, max_entries: int | None) -> _Part:
        """Keeps the largest `max_entries` entries of every row (None: all), the rest goes to the tail."""
        width = int((self.ids_TM >= 0).sum(axis=1).max(initial=0))
        if max_entries is None or width <= max_entries:
            return _Part(self.ids_TM[:, : width + 1].copy(), self.probs_TM[:, : width + 1].copy(), self.tail_T)
        order_TM = np.argsort(-self.probs_TM, axis=1, kind="stable")[:, : max_entries + 1]
        ids_TM = np.take_along_axis(self.ids_TM, order_TM, axis=1)
        probs_TM = np.take_along_axis(self.probs_TM, order_TM, axis=1)
        ids_TM[:, -1], probs_TM[:, -1] = -1, 0.0
        lost_T = self.probs_TM.sum(axis=1, dtype=np.float64) - probs_TM.sum(axis=1, dtype=np.float64)
        return _Part(ids_TM, probs_TM, self.tail_T + lost_T)


def _join(parts: list[_Part]) -> _Part:
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
    return _Part(ids_TM, probs_TM, np.concatenate([part.tail_T for part in parts] or [np.zeros(0)]))


class _Window:
    """One text in both tokenisations, in the source's byte positions.

    A source with a dummy prefix reads " text": its positions are shifted by that one virtual byte, and a target
    without dummy prefix starts behind it, where the source's first row is conditioned on the space.
    """

    def __init__(
        self, pair: ByteProjection, text: bytes, ids_S: Int32, ends_S: Int32, usable_S: Bool, target: Encoding
    ) -> None:
        for name, ends in (("source", ends_S), ("target", target.byte_ends_T)):
            if (int(ends[-1]) if len(ends) else 0) != len(text):
                raise ValueError(f"{name}: byte_ends stop at {ends[-1:]}, the text has {len(text)} bytes")
        self.pair, self.target, self.ids_S = pair, target, ids_S
        source = pair.source
        source_virtual = source.num_virtual_bytes(ids_S, ends_S)
        target_virtual = pair.target.num_virtual_bytes(target.token_ids_T, target.byte_ends_T)
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

    def map(self, rows: _Rows, first_row: int) -> _Part:
        """The target tokens that start in the given source rows, the first of which is row `first_row`."""
        source, pair = self.pair.source, self.pair
        num_rows, k = rows.ids_RK.shape
        low, high = np.searchsorted(self.row_of_T, [first_row, first_row + num_rows])
        tokens = slice(int(low), int(high))
        width = min(k + 1, pair.target.size) + 1
        pending_P = np.empty(_PENDING, dtype=np.int64)
        while True:
            part = _Part(
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
                pair.first_table,
                self.row_of_T[tokens],
                self.starts_T[tokens],
                self.at_start_T[tokens],
                self.wanted_T[tokens],
                *part,
                self.log_prefix_mass_T[tokens],
                pending_P,
            )
            if num_pending == 0:
                return part
            pair.resolve(pending_P[:num_pending])

    def finish(self, parts: list[_Part], gold_S: Float64) -> ProjectedRows:
        """Joins the parts and puts the realised tokens' exact probabilities in."""
        mask_T = self.mask_T & self.wanted_T
        ids_TM, probs_TM, tail_T = _join(parts)
        covered_T = np.where(mask_T, 1.0 - tail_T, 0.0).astype(np.float32)
        gold_T = np.minimum(np.diff(self._logprob_at_boundaries(gold_S)), 0.0)
        carry_realised(self.target.token_ids_T, gold_T, mask_T, ids_TM, probs_TM, tail_T)
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
