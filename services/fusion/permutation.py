"""Orders of windows that are computed place by place: nothing is stored, for a thousand windows as for a billion."""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_GROUPS_AT_ONCE = 8


class Permutation:
    """A keyed permutation of 0..size-1: a Feistel network over the next power of four, walked until inside."""

    def __init__(self, size: int, key: str) -> None:
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._key = hashlib.sha256(key.encode()).digest()

    def __getitem__(self, position: int) -> int:
        assert 0 <= position < self._size
        while True:
            position = self._encrypt(position)
            if position < self._size:
                return position

    def _encrypt(self, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for round_number in range(_ROUNDS):
            message = round_number.to_bytes(1, "little") + right.to_bytes(8, "little")
            digest = hashlib.blake2b(message, key=self._key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return (left << self._half_bits) | right


class BlockPermutation:
    """A permutation of 0..size-1 that moves blocks of `block` neighbours as a whole.

    The numbers behind the last whole block stay where they are, at the end.
    """

    def __init__(self, size: int, key: str, block: int) -> None:
        self._whole, self._block = size // block, block
        self._blocks = Permutation(max(1, self._whole), key)

    def __getitem__(self, position: int) -> int:
        number, within = divmod(position, self._block)
        return position if number >= self._whole else self._blocks[number] * self._block + within


class GroupPermutation:
    """A permutation of 0..size-1 for numbers whose neighbours are read from disk together, in groups.

    Groups of `group` neighbours are shuffled as a whole, and then, of every few groups that follow each other in that
    order, the blocks of `block` neighbours; `group` is a multiple of `block`. A reader that keeps a few groups in
    memory reads each of them once.
    """

    def __init__(self, size: int, key: str, block: int, group: int) -> None:
        assert group % block == 0, (group, block)
        self._size, self._key, self._block = size, key, block
        self._groups = BlockPermutation(size, key, group)
        self._stretch = group * _GROUPS_AT_ONCE
        self._last: tuple[int, BlockPermutation] | None = None

    def __getitem__(self, position: int) -> int:
        number, within = divmod(position, self._stretch)
        last = self._last
        if last is None or last[0] != number:
            size = min(self._stretch, self._size - number * self._stretch)
            last = self._last = number, BlockPermutation(size, f"{self._key}:{number}", self._block)
        return self._groups[number * self._stretch + last[1][within]]
