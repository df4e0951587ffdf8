"""The order of a rank's windows: a function of data set, split, seed, parts, rank and world size."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from services.base.errors import FailedPreconditionError, InvalidArgumentError
from services.fusion.parts import Part, PartOrder, Pool, check_parts
from services.wire.cursor import Cursor, dealt_position, num_dealt


@dataclass(frozen=True, slots=True)
class OrderedWindow:
    """One window of a rank's stream.

    Attributes:
        index: place in its split.
        cursor: position after it.
        pool: the split, where it is another one than the stream's; "" else.
        pass_number: how often the pool has been drawn as a whole before.
    """

    index: int
    cursor: Cursor
    pool: str
    pass_number: int


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """The stream of one rank. Raises InvalidArgumentError naming the field that is out of range.

    A stream has one part after the other: its epochs, or `parts`. At every point the windows of a part that are not yet
    `dealt` are shared out in blocks of `block_windows` neighbours in the order, to one rank after the other (see
    `services.wire.cursor.num_dealt`). Shards are disjoint and complete for any number of ranks.

    Of a split with more than `MANY_WINDOWS`, the order draws windows that are read together near each other. A cursor
    that was given out when all orders drew windows one by one goes on in that order.

    Attributes:
        num_windows: windows of the split, so of one epoch.
        block_windows: windows that come together, because they follow each other in a conversation.
        parts: instead of epochs.
        pools: by name, the splits other than the stream's that `parts` draw from.
        windows_per_group: of the split, as in `Pool`.
    """

    split_fingerprint: str
    num_windows: int
    seed: int
    rank: int
    world_size: int
    num_epochs: int
    block_windows: int = 1
    parts: tuple[Part, ...] = ()
    pools: Mapping[str, Pool] = field(default_factory=dict)
    windows_per_group: int = 0

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise InvalidArgumentError(f"world_size: must be at least 1, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise InvalidArgumentError(f"rank: must be 0 to {self.world_size - 1}, got {self.rank}")
        if self.num_epochs < 1:
            raise InvalidArgumentError(f"num_epochs: must be at least 1, got {self.num_epochs}")
        if self.num_windows < 1:
            raise InvalidArgumentError("split: has no windows")
        check_parts(self.parts, self._all_pools)

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that a cursor refers to. World size is no part of it: it may change during a stream."""
        return self._fingerprint(in_groups=True)

    def _fingerprint(self, *, in_groups: bool) -> str:
        text = f"{self.split_fingerprint}:{self.seed}"
        if self.block_windows > 1:
            text += f":{self.block_windows}"
        if self.parts:
            pools = {name: self._all_pools[name].fingerprint for part in self.parts for name, _ in part.weights}
            text += ":" + json.dumps([[(part.num_windows, part.weights) for part in self.parts], sorted(pools.items())])
        names = {name for part in self.parts for name, _ in part.weights} or {""}
        groups = {name: self._all_pools[name].group(self.block_windows) for name in sorted(names)}
        if in_groups and any(groups.values()):
            text += ":groups:" + json.dumps(groups)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def windows(self, cursor: Cursor | None) -> Iterator[OrderedWindow]:
        """Return the windows from `cursor` on; raises FailedPreconditionError for a cursor of another plan."""
        at = cursor or Cursor(epoch=0, dealt=0, received=0, plan=self.fingerprint)
        if at.plan not in {self.fingerprint, self._fingerprint(in_groups=False)}:
            raise FailedPreconditionError(
                f"cursor.plan: {at.plan} belongs to another data set, split, seed or parts; this stream has "
                f"{self.fingerprint}"
            )
        size = self._part(at.epoch).num_windows if at.epoch < self._num_parts else 0
        if at.epoch > self._num_parts or at.dealt > size or at.received > self._shard_size(at.dealt, size):
            raise InvalidArgumentError(
                f"cursor: epoch {at.epoch}, dealt {at.dealt}, received {at.received} lies outside {self._num_parts} "
                f"epochs of {size or self.num_windows} windows"
            )
        return self._windows(at)

    @property
    def _num_parts(self) -> int:
        return len(self.parts) or self.num_epochs

    @property
    def _all_pools(self) -> dict[str, Pool]:
        return {**self.pools, "": Pool(self.split_fingerprint, self.num_windows, self.windows_per_group)}

    def _part(self, number: int) -> Part:
        return self.parts[number] if self.parts else Part(self.num_windows)

    def _order(self, number: int, *, in_groups: bool) -> PartOrder:
        drawn = Counter({"": number * self.num_windows} if not self.parts else {})
        for part in self.parts[:number]:
            drawn.update(part.drawn())
        return PartOrder(
            self._part(number),
            drawn,
            self._all_pools,
            seed=self.seed,
            block=self.block_windows,
            in_groups=in_groups,
        )

    def _windows(self, at: Cursor) -> Iterator[OrderedWindow]:
        dealt, received, plan = at.dealt, at.received, at.plan
        for epoch in range(at.epoch, self._num_parts):
            order = self._order(epoch, in_groups=plan == self.fingerprint)
            for number in range(received, self._shard_size(dealt, self._part(epoch).num_windows)):
                position = dealt_position(
                    self.rank, self.world_size, number, shared_from=dealt, block_windows=self.block_windows
                )
                place = order[position]
                cursor = Cursor(epoch=epoch, dealt=dealt, received=number + 1, plan=plan)
                yield OrderedWindow(place.index, cursor, place.pool, place.pass_number)
            dealt, received = 0, 0

    def _shard_size(self, dealt: int, size: int) -> int:
        return num_dealt(self.rank, self.world_size, dealt, size, shared_from=dealt, block_windows=self.block_windows)
