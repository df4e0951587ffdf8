"""Edit distances between token pieces, and the search for the nearest piece of a vocabulary.

Distances are bit-parallel (Hyyrö 2003, "A bit-vector algorithm for computing Levenshtein and Damerau edit
distances"): one machine word per pattern of up to 64 symbols, plain dynamic programming beyond. The nearest of many
texts is found behind an exact lower bound, the bag distance (Bartolini et al. 2002): max(|x|, |y|) minus the symbols
that x and y share, counted with multiplicity. It leaves about one text in a hundred to be compared.

Shape legend: X patterns, Y texts, A symbols of the common alphabet, P positions, K candidates per position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusion_core.alignment.published.pieces import Pieces
from fusion_core.arrays import Int32, Int64, UInt8, UInt16, UInt64
from fusion_core.compiled import compiled

_WORD_BITS = 64
_BLOCK = 64
"""Texts to a block of lower bounds: a block without a promising text is skipped as a whole."""
_MAX_BAG = 255
"""Largest bag: its size is a byte, 32 of them to a vector register. Longer patterns are compared without the bound."""
_DENSE_SHARE = 64
"""Inverse share of the texts: a feature that 1/64 of them have becomes a row of bytes, a rarer one a list of texts."""


def candidate_distances(
    left: Pieces, left_ids_PK: Int32, right: Pieces, right_ids_PK: Int32, alphabet_size: int
) -> UInt16:
    """Return distances between the candidates of every position: uint16 [P, K_left, K_right], 0 where an id is -1."""
    return _candidate_distances(
        left.symbols, left.offsets, left_ids_PK, right.symbols, right.offsets, right_ids_PK, alphabet_size
    )


class _Bags(NamedTuple):
    """The texts by the symbols that they contain. Feature `first_A[a] + m` is "symbol a occurs more than m times"."""

    first_A: Int64
    starts_F: Int64
    texts_of_F: Int64  # texts with feature f: texts_of_F[starts_F[f]:starts_F[f + 1]]
    row_F: Int64  # the row of a frequent feature, -1 for a rare one
    rows_RY: UInt8
    lengths_Y: UInt8


class NearestPieces:
    """A search for the pieces of a set at minimum edit distance from pieces of another set.

    Args:
        texts: the set that is searched, at least one piece; ties go to the first.
        alphabet_size: the number of symbols of the common alphabet, see `common_alphabet`.
    """

    def __init__(self, texts: Pieces, alphabet_size: int) -> None:
        assert len(texts) > 0
        self._texts = texts
        self._alphabet_size = alphabet_size
        lengths_Y = np.full(-(-len(texts) // _BLOCK) * _BLOCK, _MAX_BAG, np.uint8)
        lengths_Y[: len(texts)] = np.minimum(texts.lengths, _MAX_BAG)
        first_A, features = _features(texts.symbols, texts.offsets, alphabet_size)
        counts_F = np.bincount(features, minlength=int(first_A[-1]))
        starts_F = np.concatenate([[0], np.cumsum(counts_F)])
        texts_of_F = np.repeat(np.arange(len(texts)), texts.lengths)[np.argsort(features, kind="stable")]
        dense_F = counts_F * _DENSE_SHARE >= len(texts)
        row_F = np.where(dense_F, np.cumsum(dense_F) - 1, -1)
        rows_RY = np.zeros((int(dense_F.sum()), lengths_Y.shape[0]), np.uint8)
        for feature in np.flatnonzero(dense_F):
            rows_RY[row_F[feature], texts_of_F[starts_F[feature] : starts_F[feature + 1]]] = 1
        self._bags = _Bags(first_A, starts_F, texts_of_F, row_F, rows_RY, lengths_Y)

    def first(self, patterns: Pieces) -> tuple[Int64, Int64]:
        """Return the first text at minimum distance of every pattern, and that distance: two int64 [X]."""
        texts = self._texts
        return _first_nearest(
            patterns.symbols, patterns.offsets, texts.symbols, texts.offsets, self._alphabet_size, self._bags
        )

    def all_at(self, pattern: Int32, distance: int) -> Int64:
        """Return every text at exactly `distance` from the pattern, in order: int64."""
        return _all_at(pattern, distance, self._texts.symbols, self._texts.offsets, self._alphabet_size, self._bags)


@compiled
def _mark(pattern: Int32, masks_A: UInt64) -> None:
    for position in range(min(pattern.shape[0], _WORD_BITS)):
        masks_A[pattern[position]] |= np.uint64(1) << np.uint64(position)


@compiled
def _unmark(pattern: Int32, masks_A: UInt64) -> None:
    for position in range(min(pattern.shape[0], _WORD_BITS)):
        masks_A[pattern[position]] = np.uint64(0)


@compiled
def _marked_distance(length: int, text: Int32, masks_A: UInt64) -> np.int64:
    """Return the distance of `text` to the marked pattern of 1 to 64 symbols (Hyyrö 2003, figure 3, global variant)."""
    one, last = np.uint64(1), np.uint64(length - 1)
    rises, falls = ~np.uint64(0), np.uint64(0)  # where the column's vertical difference is +1, -1
    distance = np.int64(length)
    for at in range(text.shape[0]):
        equal = masks_A[text[at]]
        vertical = equal | falls
        horizontal = (((equal & rises) + rises) ^ rises) | equal
        up = falls | ~(horizontal | rises)
        down = rises & horizontal
        distance += np.int64((up >> last) & one) - np.int64((down >> last) & one)
        up = (up << one) | one
        rises = (down << one) | ~(vertical | up)
        falls = up & vertical
    return distance


@compiled
def _long_distance(left: Int32, right: Int32) -> np.int64:
    """Return a distance by the textbook recurrence on one row, for pieces that do not fit a machine word."""
    row = np.arange(right.shape[0] + 1, dtype=np.int64)
    for i in range(left.shape[0]):
        diagonal, row[0] = row[0], i + 1
        for j in range(right.shape[0]):
            change = diagonal + (left[i] != right[j])
            diagonal = row[j + 1]
            row[j + 1] = min(change, diagonal + 1, row[j] + 1)
    return np.int64(row[right.shape[0]])


@compiled
def _distance(pattern: Int32, text: Int32, masks_A: UInt64) -> np.int64:
    """Return the distance of `text` to a pattern that is marked in `masks_A`."""
    if pattern.shape[0] == 0:
        return np.int64(text.shape[0])
    if pattern.shape[0] <= _WORD_BITS:
        return _marked_distance(pattern.shape[0], text, masks_A)
    return _long_distance(pattern, text)


@compiled
def _candidate_distances(
    left: Int32, left_ends: Int64, left_PK: Int32, right: Int32, right_ends: Int64, right_PK: Int32, alphabet: int
) -> UInt16:
    distances = np.zeros((left_PK.shape[0], left_PK.shape[1], right_PK.shape[1]), np.uint16)
    masks_A = np.zeros(alphabet, np.uint64)
    for position in range(left_PK.shape[0]):
        for row in range(left_PK.shape[1]):
            piece = left_PK[position, row]
            if piece < 0:
                continue
            pattern = left[left_ends[piece] : left_ends[piece + 1]]
            _mark(pattern, masks_A)
            for column in range(right_PK.shape[1]):
                other = right_PK[position, column]
                if other >= 0:
                    text = right[right_ends[other] : right_ends[other + 1]]
                    distances[position, row, column] = _distance(pattern, text, masks_A)
            _unmark(pattern, masks_A)
    return distances


@compiled
def _features(texts: Int32, ends: Int64, alphabet: int) -> tuple[Int64, Int64]:
    """Return `first_A` [A + 1] and the feature that every symbol of the texts adds to its text's bag."""
    most_A = np.zeros(alphabet, np.int64)
    seen_A = np.zeros(alphabet, np.int64)
    features = np.empty(texts.shape[0], np.int64)
    for text in range(ends.shape[0] - 1):
        for at in range(ends[text], ends[text + 1]):
            features[at] = seen_A[texts[at]]
            seen_A[texts[at]] += 1
            most_A[texts[at]] = max(most_A[texts[at]], seen_A[texts[at]])
        for at in range(ends[text], ends[text + 1]):
            seen_A[texts[at]] = 0
    first_A = np.zeros(alphabet + 1, np.int64)
    first_A[1:] = np.cumsum(most_A)
    for at in range(texts.shape[0]):
        features[at] += first_A[texts[at]]
    return first_A, features


@compiled
def _lower_bounds(pattern: Int32, bags: _Bags, seen_A: Int64, bounds_Y: UInt8, lowest_B: UInt8) -> None:
    """Return bag distances of `pattern` to all texts, and the lowest of each block; all 0 for a long pattern."""
    bounds_Y[:] = 0
    lowest_B[:] = 0
    if pattern.shape[0] > _MAX_BAG:
        return
    for at in range(pattern.shape[0]):
        feature = bags.first_A[pattern[at]] + seen_A[pattern[at]]
        seen_A[pattern[at]] += 1
        if feature >= bags.first_A[pattern[at] + 1]:
            continue
        if bags.row_F[feature] >= 0:
            row = bags.rows_RY[bags.row_F[feature]]
            for y in range(bounds_Y.shape[0]):
                bounds_Y[y] += row[y]
        else:
            for entry in range(bags.starts_F[feature], bags.starts_F[feature + 1]):
                bounds_Y[bags.texts_of_F[entry]] += 1
    for at in range(pattern.shape[0]):
        seen_A[pattern[at]] = 0
    length = np.uint8(pattern.shape[0])
    for block in range(lowest_B.shape[0]):
        lowest = np.uint8(255)
        for y in range(block * _BLOCK, (block + 1) * _BLOCK):
            bounds_Y[y] = max(length, bags.lengths_Y[y]) - bounds_Y[y]
            lowest = min(lowest, bounds_Y[y])
        lowest_B[block] = lowest


@compiled
def _first_nearest(
    patterns: Int32, pattern_ends: Int64, texts: Int32, ends: Int64, alphabet: int, bags: _Bags
) -> tuple[Int64, Int64]:
    nearest_X = np.zeros(pattern_ends.shape[0] - 1, np.int64)
    distance_X = np.zeros(pattern_ends.shape[0] - 1, np.int64)
    masks_A = np.zeros(alphabet, np.uint64)
    seen_A = np.zeros(alphabet, np.int64)
    bounds_Y = np.empty(bags.lengths_Y.shape[0], np.uint8)
    lowest_B = np.empty(bags.lengths_Y.shape[0] // _BLOCK, np.uint8)
    for x in range(nearest_X.shape[0]):
        pattern = patterns[pattern_ends[x] : pattern_ends[x + 1]]
        _lower_bounds(pattern, bags, seen_A, bounds_Y, lowest_B)
        _mark(pattern, masks_A)
        nearest, distance, bound = ends.shape[0] - 1, np.int64(1 << 60), 0
        # Texts are compared in the order of (bound, place). Nothing bounded by more than the best distance can reach
        # it, and of those bounded by exactly the best distance only a text before the best one could still win.
        while bound <= distance and bound <= _MAX_BAG:
            for block in range(lowest_B.shape[0]):
                if lowest_B[block] > bound:
                    continue
                if bound == distance and block * _BLOCK > nearest:
                    break
                for y in range(block * _BLOCK, min((block + 1) * _BLOCK, ends.shape[0] - 1)):
                    if bounds_Y[y] != bound or (bound == distance and y > nearest):
                        continue
                    found = _distance(pattern, texts[ends[y] : ends[y + 1]], masks_A)
                    if found < distance or (found == distance and y < nearest):
                        nearest, distance = y, found
            bound += 1
        _unmark(pattern, masks_A)
        nearest_X[x], distance_X[x] = nearest, distance
    return nearest_X, distance_X


@compiled
def _all_at(pattern: Int32, distance: int, texts: Int32, ends: Int64, alphabet: int, bags: _Bags) -> Int64:
    masks_A = np.zeros(alphabet, np.uint64)
    bounds_Y = np.empty(bags.lengths_Y.shape[0], np.uint8)
    lowest_B = np.empty(bags.lengths_Y.shape[0] // _BLOCK, np.uint8)
    _lower_bounds(pattern, bags, np.zeros(alphabet, np.int64), bounds_Y, lowest_B)
    _mark(pattern, masks_A)
    found = np.empty(ends.shape[0] - 1, np.int64)
    used = 0
    for y in range(ends.shape[0] - 1):
        if bounds_Y[y] <= distance and _distance(pattern, texts[ends[y] : ends[y + 1]], masks_A) == distance:
            found[used] = y
            used += 1
    return found[:used]
