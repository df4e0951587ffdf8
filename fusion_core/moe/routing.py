"""The decisions of a model's routers: recorded while it runs, added up, and described.

Shape legend: L layers with experts, E routed experts of a layer, N tokens that count, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

_SOFTMAX = {"TiedRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "MixtralTopKRouter", "OlmoeTopKRouter"}
"""Classes of routers that return logits, weights and indices, and choose by a softmax over all experts."""
_SIGMOID = {"DeepseekV3TopkRouter", "Glm4MoeTopkRouter"}
"""Classes of routers that return the same, and choose by a sigmoid and a bias for each expert; the probability of an
expert is its sigmoid over the sum of all (DeepSeek-AI 2024, arXiv:2412.19437, equation 19)."""


@dataclass(frozen=True, slots=True)
class RoutingSums:
    """Sums over tokens, a row for each layer with experts.

    Attributes:
        counts_LE: float64, tokens that were sent to each expert.
        entropy_L: float64, sum of the entropy of the routers' probabilities, in nats.
        probabilities_LE: float32 (float64 of such logits) with gradient, sums of the routers' probabilities.
    """

    counts_LE: Tensor
    entropy_L: Tensor
    probabilities_LE: Tensor


class RouterRecorder:
    """Reads the routers of a model by hooks that keep their outputs and compute nothing: the recomputation of gradient
    checkpointing meets the same operations as the first pass.

    Attributes:
        layers: numbers of the layers that have routers.
        num_experts, num_active: routed experts of a layer, and those of them that a token is sent to.
        has_biases: whether a bias takes part in the choice of experts.
    """

    def __init__(self, model: nn.Module) -> None:
        """Put a hook on every router of a known class."""
        named: dict[str, Any] = {
            name: part for name, part in model.named_modules() if type(part).__name__ in _SOFTMAX | _SIGMOID
        }
        self._routers = routers = list(named.values())
        self.layers = [int(next(filter(str.isdigit, name.split(".")))) for name in named]
        self.num_experts: int = routers[0].num_experts if routers else 0
        self.num_active: int = routers[0].top_k if routers else 0
        self.has_biases = bool(routers) and type(routers[0]).__name__ in _SIGMOID
        self._outputs: list[tuple[Tensor, Tensor]] | None = None
        for router in routers:
            router.register_forward_hook(self._keep)

    def _keep(self, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._outputs is not None:
            logits_NE, _, indices_NK = output
            self._outputs.append((logits_NE, indices_NK))

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield a list that gets logits and indices of every layer while the model runs once in the block."""
        outputs: list[tuple[Tensor, Tensor]] = []
        self._outputs = outputs
        try:
            yield outputs
        finally:
            self._outputs = None

    def sums(self, outputs: list[tuple[Tensor, Tensor]], counted: Tensor) -> RoutingSums:
        """Return the sums over the tokens where `counted`, a mask of the shape of the model's input, is True."""
        return routing_sums(outputs, counted, sigmoid=self.has_biases)

    @torch.no_grad()
    def move_biases(self, load_LE: Tensor, by: float) -> None:
        """Raise the bias of every expert with a load below 1, and lower those above, by `by`.

        This balances without a loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1).
        """
        for router, load_E in zip(self._routers, load_LE, strict=True):
            bias_E = router.e_score_correction_bias
            bias_E += by * torch.sign(1 - load_E).to(bias_E)


def routing_sums(outputs: list[tuple[Tensor, Tensor]], counted: Tensor, *, sigmoid: bool = False) -> RoutingSums:
    """Return the sums over the tokens where `counted`, a mask of the shape of the model's input, is True.

    The probabilities are the softmax of the logits, or with `sigmoid` their sigmoids over the sum of these.
    """
    counts, entropies, probabilities = [], [], []
    where = counted.reshape(-1)
    for logits, indices in outputs:
        logits_NE = logits[where].to(torch.promote_types(logits.dtype, torch.float32))
        logprobs_NE = torch.log_softmax(logsigmoid(logits_NE) if sigmoid else logits_NE, dim=-1)
        probabilities_NE = logprobs_NE.exp()
        probabilities.append(probabilities_NE.sum(0))
        entropies.append(-(probabilities_NE * logprobs_NE).detach().sum(dtype=torch.float64))
        counts.append(torch.bincount(indices[where].reshape(-1), minlength=logits.shape[-1]).double())
    return RoutingSums(torch.stack(counts), torch.stack(entropies), torch.stack(probabilities))


def describe(counts_LE: Tensor, entropy_L: Tensor, num_tokens: float) -> dict[str, list[float]]:
    """Return figures of every layer from sums over `num_tokens`:

    load_cv: standard deviation of the experts' loads over their mean; 0 when even.
    dead_experts: the number of experts that no token was sent to.
    router_entropy: mean entropy of the router's probabilities in nats; log E when it is undecided.
    """
    deviation_L, mean_L = counts_LE.std(dim=1, unbiased=False), counts_LE.mean(dim=1).clamp_min(1e-300)
    return {
        "load_cv": (deviation_L / mean_L).tolist(),
        "dead_experts": (counts_LE == 0).sum(dim=1).tolist(),
        "router_entropy": (entropy_L / num_tokens).tolist(),
    }
