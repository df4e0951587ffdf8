"""Token pieces as runs of symbols, the form in which the published methods compare them.

A piece is a run of Unicode code points, the unit of the published methods; a byte that is not part of a complete
UTF-8 character counts as one symbol of its own (Python's `surrogateescape`), so two pieces are equal exactly when
their bytes are. "Ċ", "<0x0A>" and "\\n" are one piece, whatever its name in a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusion_core.arrays import Int32, Int64, UInt8
from fusion_core.compiled import compiled

_SPACE = 0x20
_ESCAPE = 0xDC00


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Strings as runs of symbols: piece i is `symbols[offsets[i]:offsets[i + 1]]`."""

    symbols: Int32
    offsets: Int64

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)


def decode_pieces(blob: UInt8, offsets: Int64, *, without_spaces: bool = False) -> Pieces:
    """Decode byte strings into code points, as `bytes.decode("utf-8", "surrogateescape")` does.

    Args:
        blob: the bytes of all pieces, one after the other.
        offsets: piece i is `blob[offsets[i]:offsets[i + 1]]`.
        without_spaces: leave every U+0020 out, so that a piece has no space marker.
    """
    symbols, ends = _decode(blob, offsets, _SPACE if without_spaces else -1)
    return Pieces(symbols, ends)


def common_alphabet(*sets: Pieces) -> tuple[list[Pieces], int]:
    """Renumber the symbols of several sets of pieces to 0..A-1; return them and A."""
    alphabet = np.unique(np.concatenate([pieces.symbols for pieces in sets]))
    renumbered = [Pieces(np.searchsorted(alphabet, p.symbols).astype(np.int32), p.offsets) for p in sets]
    return renumbered, int(alphabet.shape[0])


@compiled
def _decode(blob: UInt8, offsets: Int64, dropped: int) -> tuple[Int32, Int64]:
    symbols = np.empty(offsets[-1] - offsets[0], np.int32)
    ends = np.zeros(offsets.shape[0], np.int64)
    used = 0
    for piece in range(offsets.shape[0] - 1):
        at, end = offsets[piece], offsets[piece + 1]
        while at < end:
            lead = np.int32(blob[at])
            width, point, smallest = 1, lead, 0
            if lead >= 0x80:
                point = np.int32(_ESCAPE + lead)
                if 0xC2 <= lead <= 0xDF:
                    width, smallest = 2, 0x80
                elif 0xE0 <= lead <= 0xEF:
                    width, smallest = 3, 0x800
                elif 0xF0 <= lead <= 0xF4:
                    width, smallest = 4, 0x10000
                value = lead & (0x7F >> width)
                complete = width > 1 and at + width <= end
                for step in range(1, width):
                    if complete:
                        following = np.int32(blob[at + step])
                        complete = (following & 0xC0) == 0x80
                        value = (value << 6) | (following & 0x3F)
                surrogate = 0xD800 <= value <= 0xDFFF
                if complete and smallest <= value <= 0x10FFFF and not surrogate:
                    point = np.int32(value)
                else:
                    width = 1
            if point != dropped:
                symbols[used] = point
                used += 1
            at += width
        ends[piece + 1] = used
    return symbols[:used], ends
