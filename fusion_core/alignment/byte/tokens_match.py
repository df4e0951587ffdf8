"""Place both tokenisations of a window in the text, and tell which tokens match it.

Shape legend: S source tokens, T target tokens, V source ids, B bytes of all source ids together, N bytes of the text.
"""

from __future__ import annotations

import numpy as np

from fusion_core.alignment.byte.columns import Records
from fusion_core.arrays import Bool, Int32, Int64, UInt8
from fusion_core.compiled import compiled


@compiled
def place_sources(
    bytes_B: UInt8,
    offsets_V1: Int64,
    text_N: UInt8,
    token_ids_S: Int32,
    byte_ends_S: Int32,
    lossless_S: Bool,
    shift: int,
    sources_S: Records,
) -> None:
    """Fill in id, start and end of every source token, and whether it can be read as bytes of the text.

    A token is readable when it covers at least one byte, and its own bytes are those; positions are moved by `shift`.
    """
    start = 0
    for s in range(token_ids_S.shape[0]):
        source, token, end = sources_S[s], token_ids_S[s], byte_ends_S[s] + shift
        same = bool(lossless_S[s]) and 0 <= token < offsets_V1.shape[0] - 1 and end > start
        if same:
            first, n = offsets_V1[token], 0
            same = offsets_V1[token + 1] - first == end - start
            while same and n < end - start:
                same = bytes_B[first + n] == text_N[start + n]
                n += 1
        source.id, source.start, source.end, source.readable = token, start, end, same
        start = end


@compiled
def place_targets(
    token_ids_T: Int32,
    byte_ends_T: Int32,
    lossless_T: Bool,
    shift: int,
    first_start: int,
    sources_S: Records,
    targets_T: Records,
) -> None:
    """Fill in the target tokens: id, start and end, the source rows that they lie in, and whether they are wanted.

    A target token is wanted when it is lossless and covers bytes, all of them in source tokens that can be read.
    """
    num_sources, row, last_row, start = sources_S.shape[0], -1, -1, first_start
    num_unreadable_S1 = np.zeros(num_sources + 1, dtype=np.int64)
    for s in range(num_sources):
        num_unreadable_S1[s + 1] = num_unreadable_S1[s] + (not sources_S[s].readable)
    for t in range(token_ids_T.shape[0]):
        target, end = targets_T[t], byte_ends_T[t] + shift
        while row + 1 < num_sources and sources_S[row + 1].start <= start:
            row += 1
        last_row = max(last_row, row)
        while last_row + 1 < num_sources and sources_S[last_row + 1].start < end:
            last_row += 1
        target.id, target.start, target.end, target.row, target.last_row = token_ids_T[t], start, end, row, last_row
        target.wanted = (
            row >= 0 and lossless_T[t] and end > start and num_unreadable_S1[last_row + 1] == num_unreadable_S1[row]
        )
        start = end
