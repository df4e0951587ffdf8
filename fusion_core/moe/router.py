"""The router of a split mixture while it is trained: the experts of a copy keep one router row.

A row for each expert would fall apart with the first steps, and a token would be sent to some shards of its copy twice
and to others never. So the rows of a copy are averaged in the forward pass: each gets the same gradient, and AdamW
keeps equal rows equal. What is saved are ordinary rows, which any engine reads. The loss of the text has no slope in
these rows (see `_without_slope`): a balance loss alone turns them, and weight decay shortens them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class TiedRouter(nn.Module):
    """In place of transformers' router of a layer (logits, weights and indices of the top k), with the same weight.

    Attributes:
        weight: [E, D], the experts copy by copy.
    """

    def __init__(self, router: Any, copies: int) -> None:
        """Take over a `Qwen2MoeTopKRouter`; ValueError when the copies are no whole number of experts each."""
        super().__init__()
        self.weight = router.weight
        self.top_k, self.num_experts, self.norm_topk_prob = router.top_k, router.num_experts, router.norm_topk_prob
        self.copies = copies
        if self.num_experts != copies * self.top_k:
            raise ValueError(
                f"router_copies: {copies} copies of {self.top_k} experts are not the {self.num_experts} of a layer"
            )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [T, E], weights [T, k] and indices [T, k] of the chosen experts, T tokens."""
        states_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows_CD = self.weight.view(self.copies, -1, self.weight.shape[1]).mean(1)
        logits_TE = functional.linear(states_TD, rows_CD).repeat_interleave(self.top_k, dim=-1)
        probabilities_TE = torch.softmax(logits_TE, dtype=torch.float32, dim=-1)
        weights_TK, indices_TK = torch.topk(probabilities_TE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = _without_slope(weights_TK / weights_TK.sum(dim=-1, keepdim=True))
        return logits_TE, weights_TK.to(logits_TE.dtype), indices_TK


def _without_slope(weights_TK: Tensor) -> Tensor:
    """Return weights whose gradient is exactly zero.

    The experts of a copy have equal probabilities, so that normalised weights are 1 / k whatever the rows are: their
    gradient is rounding, which AdamW would scale up to steps of full size. It is zero and not absent: DDP waits for
    the gradient of every weight.
    """
    return weights_TK.detach() + 0.0 * weights_TK


def tie_routers(model: nn.Module, copies: int) -> None:
    """Put a `TiedRouter` in place of every router of a Qwen2-MoE model."""
    for module in list(model.modules()):
        router = getattr(module, "gate", None)
        if hasattr(module, "experts") and hasattr(router, "top_k"):
            module.gate = TiedRouter(router, copies)
