"""The routers of a target during a run: the balance loss of a step, and figures of its routing over all workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.moe.balance import device_balance, expert_balance
from fusion_core.moe.routing import RouterRecorder, RoutingSums, describe
from services.distill.data.batch import Batch
from services.distill.target.config import BalanceConfig
from services.distill.workers.world import World

FIGURES = ("layers", "load_cv", "dead_experts", "router_entropy", "balance")
"""Keys of the figures that metrics.jsonl has for every step."""


class TargetRouting:
    """The routing of every step; nothing at all for a target without experts.

    Positions that predict a token count: padding and contexts are left out.
    """

    def __init__(self, model: nn.Module, balance: BalanceConfig | None, world: World) -> None:
        """Put hooks on the routers of the model; without `balance` they are only watched."""
        self._recorder, self._balance, self._world = RouterRecorder(model), balance, world

    @property
    def counts_first(self) -> bool:
        """True when a loss needs the tokens of every expert in the whole step before the first gradient."""
        return (
            bool(self._recorder.layers)
            and self._balance is not None
            and bool(self._balance.expert or self._balance.device)
        )

    def step(self, num_tokens: float) -> StepRouting:
        """Return the sums of a step, still empty; `num_tokens` is the size of its global batch."""
        return StepRouting(self._recorder, self._balance if self.counts_first else None, self._world, num_tokens)

    def move_biases(self, load: list[list[float]]) -> None:
        """Move the routers' biases, where that is asked for, after a step with this load (see `figures`)."""
        if self._balance is not None and self._balance.bias:
            self._recorder.move_biases(torch.tensor(load), self._balance.bias)


class StepRouting:
    """The sums of one step. All workers call the same methods in the same order."""

    def __init__(
        self, recorder: RouterRecorder, balance: BalanceConfig | None, world: World, num_tokens: float
    ) -> None:
        self._recorder, self._balance, self._world, self._num_tokens = recorder, balance, world, num_tokens
        shape = (len(recorder.layers), recorder.num_experts)
        self._counts_LE = torch.zeros(shape, dtype=torch.float64)
        self._probabilities_LE = torch.zeros(shape, dtype=torch.float64)
        self._entropy_L = torch.zeros(shape[0], dtype=torch.float64)
        self._ahead_LE: Tensor | None = None

    def count(self, run: Callable[[Batch], Any], batches: Iterable[Batch]) -> None:
        """Run the passes of a step without gradient, and count the tokens of every expert, over all workers."""
        counts_LE = torch.zeros_like(self._counts_LE)
        with torch.no_grad():
            for batch in batches:
                with self._recorder.recording() as outputs:
                    run(batch)
                counts_LE += self._recorder.sums(outputs, batch.valid_BL).counts_LE.cpu()
        self._ahead_LE = self._over_workers(counts_LE)

    def watch(self, run: Callable[[Batch], Any], batch: Batch) -> tuple[Any, Tensor | None]:
        """Return what a pass returns, and this part's share of the balance loss of the step, None without one."""
        if not self._recorder.layers:
            return run(batch), None
        with self._recorder.recording() as outputs:
            passed = run(batch)
        sums = self._recorder.sums(outputs, batch.valid_BL)
        self._counts_LE += sums.counts_LE.cpu()
        self._entropy_L += sums.entropy_L.cpu()
        self._probabilities_LE += sums.probabilities_LE.detach().double().cpu()
        return passed, self._loss(sums)

    def _loss(self, sums: RoutingSums) -> Tensor | None:
        if self._balance is None:
            return None
        counts_LE = self._over_workers(self._counts_LE) if self._ahead_LE is None else self._ahead_LE
        return self._weighted(counts_LE.to(sums.probabilities_LE.device), sums.probabilities_LE)

    def _weighted(self, counts_LE: Tensor, probabilities_LE: Tensor) -> Tensor:
        """Return the sum over layers of the losses, weighted as configured."""
        assert self._balance is not None
        sizes: dict[str, Any] = {"num_tokens": self._num_tokens, "num_active": self._recorder.num_active}
        loss = probabilities_LE.new_zeros(())
        if self._balance.expert:
            loss = loss + self._balance.expert * expert_balance(counts_LE, probabilities_LE, **sizes).sum()
        if self._balance.device:
            groups = self._balance.groups
            per_layer = device_balance(counts_LE, probabilities_LE, **sizes, num_groups=groups)
            loss = loss + self._balance.device * per_layer.sum()
        return loss

    def figures(self) -> dict[str, Any] | None:
        """Return the figures of the step, lists with a value for each layer; None without experts.

        They are those of `services/jobs/step_log.py`, and `load`: for each layer a list with the load of each expert, 1
        when tokens are spread evenly.
        """
        recorder = self._recorder
        if not recorder.layers:
            return None
        columns = [self._counts_LE, self._probabilities_LE, self._entropy_L[:, None]]
        summed = self._over_workers(torch.cat(columns, dim=1))
        counts_LE, probabilities_LE, entropy_L1 = summed.tensor_split([recorder.num_experts, -1], dim=1)
        sizes: dict[str, Any] = {"num_tokens": self._num_tokens, "num_active": recorder.num_active}
        even = recorder.num_active * self._num_tokens / recorder.num_experts
        return {
            "layers": recorder.layers,
            **describe(counts_LE, entropy_L1[:, 0], self._num_tokens),
            "balance": expert_balance(counts_LE, probabilities_LE, **sizes).tolist(),
            "load": (counts_LE / even).tolist(),
        }

    def _over_workers(self, values: Tensor) -> Tensor:
        summed = self._world.sum(values.flatten().tolist())
        return torch.tensor(summed, dtype=torch.float64).view(values.shape)
