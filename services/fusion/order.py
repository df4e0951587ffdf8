"""The order of a rank's windows: a function of data set, split, seed, epoch, rank and world size.

Nothing is stored: the order of an epoch is a keyed permutation that is evaluated position by position, so it costs the
same for a thousand windows as for a billion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from services.base.errors import FailedPreconditionError, InvalidArgumentError
from services.wire.cursor import Cursor

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class OrderedWindow:
    """One window of a rank's stream: its index in the split, and the cursor after it."""

    index: int
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """The stream of one rank. Raises InvalidArgumentError naming the field that is out of range.

    At every point the windows of an epoch that are not yet `dealt` are shared out in turn: rank r of W ranks receives
    positions dealt + r, dealt + r + W, ... of the epoch's order. Shards are disjoint and complete for any W.
    """

    split_fingerprint: str
    num_windows: int
    seed: int
    rank: int
    world_size: int
    num_epochs: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise InvalidArgumentError(f"world_size: must be at least 1, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise InvalidArgumentError(f"rank: must be 0 to {self.world_size - 1}, got {self.rank}")
        if self.num_epochs < 1:
            raise InvalidArgumentError(f"num_epochs: must be at least 1, got {self.num_epochs}")
        if self.num_windows < 1:
            raise InvalidArgumentError("split: has no windows")

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that a cursor refers to. World size is no part of it: it may change during a stream."""
        return hashlib.sha256(f"{self.split_fingerprint}:{self.seed}".encode()).hexdigest()[:16]

    def windows(self, cursor: Cursor | None) -> Iterator[OrderedWindow]:
        """Return the windows from `cursor` on; raises FailedPreconditionError for a cursor of another plan."""
        at = cursor or Cursor(epoch=0, dealt=0, received=0, plan=self.fingerprint)
        if at.plan != self.fingerprint:
            raise FailedPreconditionError(
                f"cursor.plan: {at.plan} belongs to another data set, split or seed; this stream has {self.fingerprint}"
            )
        if at.dealt > self.num_windows or at.received > self._shard_size(at.dealt) or at.epoch > self.num_epochs:
            raise InvalidArgumentError(
                f"cursor: epoch {at.epoch}, dealt {at.dealt}, received {at.received} lies outside {self.num_epochs} "
                f"epochs of {self.num_windows} windows"
            )
        return self._windows(at)

    def _windows(self, at: Cursor) -> Iterator[OrderedWindow]:
        dealt, received = at.dealt, at.received
        for epoch in range(at.epoch, self.num_epochs):
            order = Permutation(self.num_windows, f"{self.seed}:{epoch}")
            for number in range(received, self._shard_size(dealt)):
                index = order[dealt + self.rank + number * self.world_size]
                yield OrderedWindow(index, Cursor(epoch=epoch, dealt=dealt, received=number + 1, plan=self.fingerprint))
            dealt, received = 0, 0

    def _shard_size(self, dealt: int) -> int:
        return max(0, -(-(self.num_windows - dealt - self.rank) // self.world_size))


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
