"""Position in a stream over a data set, which a trainer stores in its checkpoint to resume exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fusion.v1 import fusion_pb2


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of one rank.

    Attributes:
        epoch: counted from 0; of a stream in parts, the part.
        dealt: windows of the epoch's order that all ranks together had consumed when the shards were last dealt.
        received: windows that this rank has received since then.
        plan: fingerprint of data set, split, seed and parts; the service refuses a cursor of another plan.
    """

    epoch: int
    dealt: int
    received: int
    plan: str

    def back(self, windows: int) -> Cursor:
        """Return the position before the last `windows` windows of the same frame."""
        assert windows <= self.received, (windows, self)
        return replace(self, received=self.received - windows)

    def to_proto(self) -> fusion_pb2.Cursor:
        return fusion_pb2.Cursor(epoch=self.epoch, dealt=self.dealt, received=self.received, plan=self.plan)

    @classmethod
    def from_proto(cls, message: fusion_pb2.Cursor) -> Cursor:
        return cls(epoch=message.epoch, dealt=message.dealt, received=message.received, plan=message.plan)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        return cls(**value)


def num_dealt(rank: int, world_size: int, start: int, stop: int, *, shared_from: int, block_windows: int = 1) -> int:
    """Return how many of the positions from `start` to `stop` of an epoch's order a stream sends to `rank`.

    From `shared_from` on, the positions are dealt to `world_size` ranks in turn, block by block. Blocks begin at
    multiples of `block_windows`; where `shared_from` lies inside one, what is left of it is the first to be dealt.
    """
    first_block = shared_from // block_windows

    def dealt(position: int) -> int:
        """Return the number of positions before `position`, counted from the start of the first block."""
        rounds, rest = divmod(position - first_block * block_windows, world_size * block_windows)
        return rounds * block_windows + min(max(rest - rank * block_windows, 0), block_windows)

    return dealt(stop) - dealt(start) if start < stop else 0


def dealt_position(rank: int, world_size: int, number: int, *, shared_from: int, block_windows: int = 1) -> int:
    """Return the position in an epoch's order of the window that `rank` receives as its `number`-th, from 0.

    See `num_dealt` for the order in which positions are dealt.
    """
    first_block = shared_from // block_windows
    if rank == 0:  # as if the first block had been dealt from its start
        number += shared_from - first_block * block_windows
    rounds, within = divmod(number, block_windows)
    return (first_block + rank + rounds * world_size) * block_windows + within
