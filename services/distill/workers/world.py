"""The workers of a run, seen from one of them; a world of one needs no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def _as_is(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True, slots=True)
class World:
    """Rank and number of the workers (torch's rank and world size), this worker's device, and the function that makes a
    module parallel."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parallel: Callable[[nn.Module], nn.Module] = _as_is

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over all workers, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Return maxima over all workers."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Return a small object of every worker, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()
