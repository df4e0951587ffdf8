"""Edit distances between all pieces of one list and all pieces of another, many texts per vector register.

The bit-parallel recurrence of `edit_distance` (Hyyrö 2003) in 32-bit words, one text per lane: texts are sorted by
length and taken in batches, so that the compiler turns every step into a few vector instructions.

Shape legend: X patterns, Y texts, A symbols of the common alphabet, B batches, N symbols of the longest text, L lanes.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.published.edit_distance import candidate_distances
from fusion_core.alignment.published.pieces import Pieces
from fusion_core.arrays import Int32, Int64, UInt16, UInt32
from fusion_core.compiled import compiled

_LANES = 64
_WORD_BITS = 32


def distance_table(patterns: Pieces, rows_X: Int32, texts: Pieces, rows_Y: Int32, alphabet_size: int) -> UInt16:
    """Return edit distances between the chosen pieces of both sides: uint16 [X, Y]."""
    lengths_Y = texts.lengths[rows_Y]
    order_Y = np.argsort(lengths_Y, kind="stable")
    table_XY = np.empty((len(rows_X), len(rows_Y)), np.uint16)
    if not table_XY.size:
        return table_XY
    lanes_BNL, lengths_BL = _batches(texts.symbols, texts.offsets, rows_Y[order_Y], int(lengths_Y.max()), alphabet_size)
    _fill(patterns.symbols, patterns.offsets, rows_X, lanes_BNL, lengths_BL, order_Y, table_XY, alphabet_size)
    long_X = np.flatnonzero(patterns.lengths[rows_X] > _WORD_BITS)
    if len(long_X):
        all_texts = np.broadcast_to(rows_Y, (len(long_X), len(rows_Y)))
        distances = candidate_distances(patterns, rows_X[long_X, None], texts, all_texts, alphabet_size)
        table_XY[long_X] = distances[:, 0]
    return table_XY


@compiled
def _batches(texts: Int32, ends: Int64, rows_Y: Int32, longest: int, alphabet: int) -> tuple[Int32, Int32]:
    """Return symbols and lengths by lane; places behind a text hold the symbol `alphabet`, which no pattern has."""
    num_batches = (rows_Y.shape[0] + _LANES - 1) // _LANES
    lanes_BNL = np.full((num_batches, longest, _LANES), alphabet, np.int32)
    lengths_BL = np.zeros((num_batches, _LANES), np.int32)
    for y in range(rows_Y.shape[0]):
        batch, lane = y // _LANES, y % _LANES
        start = ends[rows_Y[y]]
        length = ends[rows_Y[y] + 1] - start
        lengths_BL[batch, lane] = length
        for at in range(length):
            lanes_BNL[batch, at, lane] = texts[start + at]
    return lanes_BNL, lengths_BL


@compiled
def _equal(masks_A: UInt32, symbols_L: Int32, equal_L: UInt32) -> None:
    for lane in range(_LANES):
        equal_L[lane] = masks_A[symbols_L[lane]]


# Three loops instead of one: with more arrays in a loop, LLVM gives up proving that they do not overlap and
# compiles scalar code. Every operation is wrapped because Numba would widen it to 64 bits.
@compiled
def _step(equal_L: UInt32, rises_L: UInt32, falls_L: UInt32, change_L: Int32, last: np.uint32) -> None:
    one = np.uint32(1)
    for lane in range(_LANES):
        equal, rises, falls = equal_L[lane], rises_L[lane], falls_L[lane]
        vertical = np.uint32(equal | falls)
        horizontal = np.uint32(np.uint32(np.uint32(np.uint32(equal & rises) + rises) ^ rises) | equal)
        up = np.uint32(falls | np.uint32(~np.uint32(horizontal | rises)))
        down = np.uint32(rises & horizontal)
        change_L[lane] = np.int32(np.uint32(up >> last) & one) - np.int32(np.uint32(down >> last) & one)
        up = np.uint32(np.uint32(up << one) | one)
        rises_L[lane] = np.uint32(np.uint32(down << one) | np.uint32(~np.uint32(vertical | up)))
        falls_L[lane] = np.uint32(up & vertical)


@compiled
def _add_where_text(distance_L: Int32, change_L: Int32, lengths_L: Int32, at: np.int32) -> None:
    for lane in range(_LANES):
        distance_L[lane] += change_L[lane] if at < lengths_L[lane] else np.int32(0)


@compiled
def _fill(
    patterns: Int32,
    ends: Int64,
    rows_X: Int32,
    lanes_BNL: Int32,
    lengths_BL: Int32,
    order_Y: Int64,
    table_XY: UInt16,
    alphabet: int,
) -> None:
    """Fill in the distances of every pattern that fits a word; the rows of longer ones are left as they are."""
    masks_A = np.zeros(alphabet + 1, np.uint32)
    equal_L, rises_L, falls_L = np.empty(_LANES, np.uint32), np.empty(_LANES, np.uint32), np.empty(_LANES, np.uint32)
    change_L, distance_L = np.empty(_LANES, np.int32), np.empty(_LANES, np.int32)
    for x in range(rows_X.shape[0]):
        pattern = patterns[ends[rows_X[x]] : ends[rows_X[x] + 1]]
        length = pattern.shape[0]
        if length > _WORD_BITS:
            continue
        for at in range(length):
            masks_A[pattern[at]] |= np.uint32(1) << np.uint32(at)
        for batch in range(lengths_BL.shape[0]):
            lengths_L = lengths_BL[batch]
            if length == 0:
                distance_L[:] = lengths_L
            else:
                rises_L[:], falls_L[:], distance_L[:] = np.uint32(0xFFFFFFFF), np.uint32(0), np.int32(length)
                for at in range(lengths_L.max()):
                    _equal(masks_A, lanes_BNL[batch, at], equal_L)
                    _step(equal_L, rises_L, falls_L, change_L, np.uint32(length - 1))
                    _add_where_text(distance_L, change_L, lengths_L, np.int32(at))
            first = batch * _LANES
            for lane in range(min(_LANES, order_Y.shape[0] - first)):
                table_XY[x, order_Y[first + lane]] = distance_L[lane]
        for at in range(length):
            masks_A[pattern[at]] = np.uint32(0)
