"""Pairs of source and target tokens: dynamic time warping over two tokenisations of one text.

The alignment of FuseLLM (ICLR 2024, section 3.2): the cost of two tokens is the edit distance of their pieces without
the space marker, the moves are diagonal, up (one more source token) and left (one more target token), ties in that
order. Only pairs in which both tokens stand alone and agree are used. Time and memory are quadratic in the length of
the window, one byte per pair of tokens.

Shape legend: S source tokens, T target tokens, U distinct ids on one side, L steps of the path.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fusion_core.alignment.published.distance_table import distance_table
from fusion_core.alignment.published.pieces import common_alphabet, decode_pieces
from fusion_core.alignment.published.vocabulary_map import VocabularyMap
from fusion_core.arrays import Bool, Int32, Int64, UInt8, UInt16
from fusion_core.blocks import Block
from fusion_core.compiled import compiled
from fusion_core.vocabulary import Encoding, Vocabulary

Match = Literal["hard", "soft"]
UNPAIRED = -1


class TokenPairs:
    """The pairing of tokens of two vocabularies.

    Args:
        source, target: the vocabularies.
        vocabulary_map: decides which unequal pieces agree when `match` is `soft`.
        match: `hard`: two tokens agree when they cover equal bytes; `soft`: also when the map sends one to the other.
        window_tokens: align windows of at least this many target tokens, cut where both tokenisations have a boundary;
            None aligns the whole sequence at once.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        vocabulary_map: VocabularyMap,
        match: Match,
        window_tokens: int | None = None,
    ) -> None:
        self._map_V = vocabulary_map.target_ids_V
        self._soft = match == "soft"
        self._window_tokens = window_tokens
        pieces = [
            decode_pieces(v.byte_table.bytes_B, v.byte_table.offsets_V1, without_spaces=True) for v in (source, target)
        ]
        (self._source, self._target), self._alphabet_size = common_alphabet(*pieces)

    def path(self, source_ids_S: Int32, target_ids_T: Int32) -> Int32:
        """Return the cheapest warping path: int32 [L, 2], pairs (s, t) from (0, 0) to (S - 1, T - 1)."""
        if len(source_ids_S) == 0 or len(target_ids_T) == 0:
            return np.zeros((0, 2), np.int32)
        source_rows, rows_S = np.unique(source_ids_S, return_inverse=True)
        target_rows, rows_T = np.unique(target_ids_T, return_inverse=True)
        # A text repeats its tokens: the distances are taken once per pair of distinct ids.
        costs_UU = distance_table(self._source, source_rows, self._target, target_rows, self._alphabet_size)
        return _trace(_moves(costs_UU, rows_S, rows_T))

    def source_of(self, block: Block, target: Encoding, *, shared: bool = False) -> Int32:
        """Return the source token that every target token is paired with: int32 [T], -1 for none.

        Both tokens must stand alone in the path and agree. With `shared` the source token may belong to several
        target tokens, as in the reference implementation, which looks at the target's side only. End rows are
        partners of each other and of nothing else.
        """
        if target.ends_document:
            end = block.num_tokens - 1 if block.ends_document else UNPAIRED
            source_of_T = self.source_of(block.without_end(), target.without_end(), shared=shared)
            return np.append(source_of_T, np.int32(end))
        block = block.without_end()
        source_of_T = np.full(target.num_tokens, UNPAIRED, np.int32)
        for sources, targets in self._windows(block.byte_ends_T, target.byte_ends_T):
            path = self.path(block.token_ids_T[sources], target.token_ids_T[targets])
            path += np.array([sources.start, targets.start], np.int32)
            once_T = np.bincount(path[:, 1], minlength=target.num_tokens) == 1
            once_S = np.bincount(path[:, 0], minlength=block.num_tokens) == 1
            alone = path[once_T[path[:, 1]] & (once_S[path[:, 0]] | shared)]
            source_of_T[alone[:, 1]] = alone[:, 0]
        text_B = np.frombuffer(block.text_bytes, np.uint8)
        agree_T = _cover_equal_bytes(text_B, block.byte_ends_T, target.byte_ends_T, source_of_T)
        if self._soft:
            ids_T = block.token_ids_T[np.maximum(source_of_T, 0)] if block.num_tokens else target.token_ids_T
            agree_T |= (source_of_T != UNPAIRED) & (self._map_V[ids_T] == target.token_ids_T)
        return np.where(agree_T, source_of_T, np.int32(UNPAIRED))

    def _windows(self, source_ends_S: Int32, target_ends_T: Int32) -> list[tuple[slice, slice]]:
        """Return runs of source and target tokens that cover the same bytes."""
        source_cuts, target_cuts = [0], [0]
        if self._window_tokens is not None:
            common = np.intersect1d(source_ends_S, target_ends_T)
            # Tokens without bytes belong to the window of the token before them.
            targets_before = np.searchsorted(target_ends_T, common, side="right")
            while True:
                place = int(np.searchsorted(targets_before, target_cuts[-1] + self._window_tokens))
                if place >= len(common) or targets_before[place] == len(target_ends_T):
                    break
                target_cuts.append(int(targets_before[place]))
                source_cuts.append(int(np.searchsorted(source_ends_S, common[place], side="right")))
        source_cuts.append(len(source_ends_S))
        target_cuts.append(len(target_ends_T))
        return [
            (slice(*source_cuts[place : place + 2]), slice(*target_cuts[place : place + 2]))
            for place in range(len(target_cuts) - 1)
        ]


@compiled
def _moves(costs_UU: UInt16, rows_S: Int64, rows_T: Int64) -> UInt8:
    """Return the move that leads to every cell at the lowest cost, [S, T]: 0 diagonal, 1 up, 2 left."""
    num_targets = rows_T.shape[0]
    moves_ST = np.empty((rows_S.shape[0], num_targets), np.uint8)
    total_T = np.empty(num_targets, np.int32)  # of the row above, then of this row
    above_T = np.empty(num_targets, np.int32)
    costs_T = np.empty(num_targets, np.int32)
    unreachable = np.int32(2**31 - 1)
    for s in range(rows_S.shape[0]):
        costs_U, moves_T = costs_UU[rows_S[s]], moves_ST[s]
        for t in range(num_targets):
            costs_T[t] = costs_U[rows_T[t]]
        if s == 0:
            above_T[:] = unreachable
            above_T[0] = 0
            moves_T[:] = 0
        else:
            above_T[0], moves_T[0] = total_T[0], 1
            for t in range(1, num_targets):
                above_T[t] = min(total_T[t - 1], total_T[t])
                moves_T[t] = total_T[t] < total_T[t - 1]
        # Only this loop depends on the cell before; the one above runs in vector registers.
        left = unreachable
        for t in range(num_targets):
            if left < above_T[t]:
                moves_T[t] = 2
            left = min(left, above_T[t]) + costs_T[t]
            total_T[t] = left
    return moves_ST


@compiled
def _trace(moves_ST: UInt8) -> Int32:
    s, t = moves_ST.shape[0] - 1, moves_ST.shape[1] - 1
    path = np.empty((s + t + 1, 2), np.int32)
    at = path.shape[0] - 1
    path[at] = s, t
    while s > 0 or t > 0:
        move = moves_ST[s, t]
        s -= move != 2
        t -= move != 1
        at -= 1
        path[at] = s, t
    return path[at:].copy()


@compiled
def _cover_equal_bytes(text_B: UInt8, source_ends_S: Int32, target_ends_T: Int32, source_of_T: Int32) -> Bool:
    equal_T = np.zeros(source_of_T.shape[0], np.bool_)
    for t in range(source_of_T.shape[0]):
        s = source_of_T[t]
        if s < 0:
            continue
        source_start = source_ends_S[s - 1] if s > 0 else 0
        target_start = target_ends_T[t - 1] if t > 0 else 0
        length = source_ends_S[s] - source_start
        same = length == target_ends_T[t] - target_start
        at = 0
        while same and at < length:
            same = text_B[source_start + at] == text_B[target_start + at]
            at += 1
        equal_T[t] = same
    return equal_T
