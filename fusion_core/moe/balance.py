"""Balance of the experts of a layer: DeepSeekMoE's losses (Dai et al. 2024, equations 12 to 17).

For T tokens, E routed experts and k of them active,

    f_e = E / (k T) * (number of tokens sent to e)
    P_e = 1 / T * (sum over tokens of the router's probability of e)

    expert level   sum over e of f_e P_e
    device level   sum over groups d of f'_d P'_d,   f'_d = mean of f_e in d,  P'_d = sum of P_e in d

Both are 1 when tokens are spread evenly, and E / k (the number of groups) when the same experts (one group) get all.
The gradient flows through P. Each layer has losses of its own: a mean over layers would hide two layers that prefer
different halves of their experts. T is the global batch: f is a number for the whole of it, and P a sum over parts, so
that workers and micro-batches add up to one loss.

Shape legend: L layers with experts, E routed experts of a layer.
"""

from __future__ import annotations

from torch import Tensor


def expert_balance(counts_LE: Tensor, probabilities_LE: Tensor, *, num_tokens: float, num_active: int) -> Tensor:
    """Return the expert-level loss of every layer, [L].

    Args:
        counts_LE: tokens that each expert got, of the global batch.
        probabilities_LE: sums of the routers' probabilities; those of a part of the batch give that part's share.
        num_tokens: T, of the global batch.
        num_active: k, the number of experts that a token is sent to.
    """
    return device_balance(
        counts_LE, probabilities_LE, num_tokens=num_tokens, num_active=num_active, num_groups=counts_LE.shape[1]
    )


def device_balance(
    counts_LE: Tensor, probabilities_LE: Tensor, *, num_tokens: float, num_active: int, num_groups: int
) -> Tensor:
    """Return the device-level loss of every layer, [L], for groups of neighbouring experts of equal size.

    Arguments as for `expert_balance`; ValueError unless `num_groups` divides the number of experts.
    """
    num_layers, num_experts = counts_LE.shape
    if num_experts % num_groups:
        raise ValueError(f"groups: must divide the {num_experts} experts of a layer, got {num_groups}")
    counts_LD = counts_LE.to(probabilities_LE).view(num_layers, num_groups, -1).mean(-1)
    probabilities_LD = probabilities_LE.view(num_layers, num_groups, -1).sum(-1)
    return num_experts / (num_active * num_tokens**2) * (counts_LD * probabilities_LD).sum(-1)
