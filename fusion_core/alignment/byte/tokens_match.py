"""Compare the target's tokenisation of a window with a token sequence."""

from __future__ import annotations

import numpy as np

from fusion_core.arrays import Bool, Int32, Int64, UInt8
from fusion_core.compiled import compiled


@compiled
def tokens_match(bytes_B: UInt8, offsets_V1: Int64, token_ids_S: Int32, starts_S1: Int64, text_N: UInt8) -> Bool:
    """Whether every token's bytes are the bytes of the text that it is said to cover, at least one."""
    match_S = np.zeros(token_ids_S.shape[0], dtype=np.bool_)
    for s in range(token_ids_S.shape[0]):
        token, begin, end = token_ids_S[s], starts_S1[s], starts_S1[s + 1]
        if 0 <= token < offsets_V1.shape[0] - 1 and end > begin:
            first = offsets_V1[token]
            same, n = offsets_V1[token + 1] - first == end - begin, 0
            while same and n < end - begin:
                same = bytes_B[first + n] == text_N[begin + n]
                n += 1
            match_S[s] = same
    return match_S
