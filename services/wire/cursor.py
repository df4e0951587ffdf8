"""Position in a stream over a data set, which a trainer stores in its checkpoint to resume exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fusion.v1 import fusion_pb2


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of one rank.

    Attributes:
        epoch: counted from 0.
        dealt: windows of the epoch's order that all ranks together had consumed when the shards were last dealt.
        received: windows that this rank has received since then.
        plan: fingerprint of data set, split and seed; the service refuses a cursor of another plan.
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
