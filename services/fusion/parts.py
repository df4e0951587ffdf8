"""Parts of a stream: a number of windows each, drawn from one pool of windows or from several in fixed shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from services.base.errors import InvalidArgumentError
from services.fusion.permutation import BlockPermutation, GroupPermutation

MAX_WEIGHT = 10_000
"""Largest sum of the weights of a part's pools, once common factors are taken out."""
MANY_WINDOWS = 1 << 18
"""Largest number of windows that are shuffled one by one; of more, neighbours on disk are drawn near each other."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A split of the data set from which windows are drawn.

    `windows_per_group` is the number of neighbours that are read together; 0 where all are in memory.
    """

    fingerprint: str
    num_windows: int
    windows_per_group: int = 0

    def group(self, block: int) -> int:
        """Return the number of windows that the order keeps near each other: whole blocks, 0 for a small pool."""
        return self.windows_per_group // block * block if self.num_windows > MANY_WINDOWS else 0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stream. Of its windows each pool gives its weight over the sum of weights.

    `weights` are pairs of a pool's name and its weight; the name "" stands for the split of the stream.
    """

    num_windows: int
    weights: tuple[tuple[str, int], ...] = (("", 1),)

    @property
    def pattern(self) -> Pattern:
        """The turns of the pools."""
        return _pattern(tuple(weight for _, weight in self.weights))

    def drawn(self) -> dict[str, int]:
        """Return the number of windows that the whole part draws from each pool."""
        counts = self.pattern.counts(self.num_windows)
        return {name: count for (name, _), count in zip(self.weights, counts, strict=True)}


class Pattern:
    """The pool of every position, so that after any number of positions each pool has been drawn less than one window
    more or less often than its share says.

    A pool's n-th window falls due in the n-th of the equal stretches that its share makes; of those due, the one whose
    stretch ends first comes first. That meets every end: unit jobs, earliest deadline first (Baruah et al. 1996,
    "Proportionate progress"). The pattern repeats after the sum of weights, and one period is kept.
    """

    def __init__(self, weights: tuple[int, ...]) -> None:
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._period = sum(self._weights)
        self._pools = np.zeros(self._period, dtype=np.int32)
        self._ordinals = np.zeros(self._period, dtype=np.int32)
        drawn = [0] * len(weights)
        for position in range(self._period):
            due = [
                (-(-(drawn[pool] + 1) * self._period // weight), pool)
                for pool, weight in enumerate(self._weights)
                if drawn[pool] * self._period // weight <= position
            ]
            pool = min(due)[1]
            self._pools[position], self._ordinals[position] = pool, drawn[pool]
            drawn[pool] += 1

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return the number of the pool at a position, and how many of its windows come before."""
        periods, within = divmod(position, self._period)
        pool = int(self._pools[within])
        return pool, periods * self._weights[pool] + int(self._ordinals[within])

    def counts(self, num_windows: int) -> list[int]:
        """Return by pool the number of windows among the first `num_windows`."""
        periods, rest = divmod(num_windows, self._period)
        begun = np.bincount(self._pools[:rest], minlength=len(self._weights))
        return [periods * weight + int(count) for weight, count in zip(self._weights, begun, strict=True)]


_pattern = lru_cache(maxsize=64)(Pattern)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a window: its pool, the pass over the pool, counted from 0, and the index in the pool's split."""

    pool: str
    pass_number: int
    index: int


class PartOrder:
    """The order of the windows of a part.

    A pool is drawn without repetition until all of its windows have come; then its next pass begins, in another order.

    Args:
        part: the part.
        drawn_before: by pool, the number of windows that earlier parts draw.
        pools: by name.
        seed: of the orders of the passes.
        block: windows that stay together, neighbours in the pool's split.
        in_groups: whether a large pool is drawn group by group.
    """

    def __init__(
        self,
        part: Part,
        drawn_before: Mapping[str, int],
        pools: Mapping[str, Pool],
        *,
        seed: int,
        block: int,
        in_groups: bool,
    ) -> None:
        self._names, self._pattern = [name for name, _ in part.weights], part.pattern
        self._drawn_before, self._pools, self._seed, self._block = drawn_before, pools, seed, block
        self._in_groups = in_groups
        self._passes: dict[str, tuple[int, BlockPermutation | GroupPermutation]] = {}

    def __getitem__(self, position: int) -> Place:
        number, ordinal = self._pattern[position]
        name = self._names[number]
        pass_number, within = divmod(self._drawn_before.get(name, 0) + ordinal, self._pools[name].num_windows)
        return Place(name, pass_number, self._order(name, pass_number)[within])

    def _order(self, name: str, pass_number: int) -> BlockPermutation | GroupPermutation:
        known = self._passes.get(name)
        if known is None or known[0] != pass_number:
            key = f"{self._seed}:{pass_number}" + (f":{name}" if name else "")
            pool = self._pools[name]
            group = pool.group(self._block) if self._in_groups else 0
            if group:
                known = pass_number, GroupPermutation(pool.num_windows, key, self._block, group)
            else:
                known = pass_number, BlockPermutation(pool.num_windows, key, self._block)
            self._passes[name] = known
        return known[1]


def check_parts(parts: tuple[Part, ...], pools: Mapping[str, Pool]) -> None:
    """Raise InvalidArgumentError naming the field of a part that is out of range; `pools` are those that are there."""
    for number, part in enumerate(parts):
        if part.num_windows < 1:
            raise InvalidArgumentError(f"parts[{number}].num_windows: must be at least 1, got {part.num_windows}")
        names = [name for name, _ in part.weights]
        if not names or len(set(names)) < len(names):
            raise InvalidArgumentError(f"parts[{number}].pools: needs at least one pool, and each only once")
        for name, weight in part.weights:
            if weight < 1:
                raise InvalidArgumentError(f"parts[{number}].pools.weight: must be at least 1, got {weight}")
            if name not in pools or pools[name].num_windows < 1:
                raise InvalidArgumentError(f"parts[{number}].pools.split: {name!r} has no windows")
        whole = sum(weight for _, weight in part.weights) // math.gcd(*(weight for _, weight in part.weights))
        if whole > MAX_WEIGHT:
            raise InvalidArgumentError(
                f"parts[{number}].pools.weight: the weights, without common factors, sum to {whole}; at most "
                f"{MAX_WEIGHT} are allowed"
            )
