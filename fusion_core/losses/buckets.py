"""Divergences between two distributions over K candidates and a tail bucket.

Both sides are log-probabilities over J = K + 1 buckets, the last one the tail; padded buckets are -inf on both sides.
Temperature acts on the buckets of both sides alike. A temperature over the whole vocabulary would need the single
probabilities inside the fused tail, which are not stored; tempering one side over the vocabulary and the other over its
buckets would move the minimum away from "equal". When nothing is in the tail both forms are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

FusionLoss = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd"]
FUSION_LOSSES: tuple[str, ...] = get_args(FusionLoss)

_FLOOR = -20.0
"""Least log-probability of a fused bucket in reverse KL, which would be infinite where only the model has mass."""


def _expectation(weights_NJ: Tensor, values_NJ: Tensor) -> Tensor:
    """Return the sum of weight times value; buckets of weight zero add nothing, even where their value is infinite."""
    return (weights_NJ * values_NJ.masked_fill(weights_NJ == 0, 0.0)).sum(-1)


def _cross_entropy(model_NJ: Tensor, fused_NJ: Tensor, _beta: float) -> Tensor:
    return -_expectation(fused_NJ.exp(), model_NJ)


def _forward_kl(model_NJ: Tensor, fused_NJ: Tensor, _beta: float) -> Tensor:
    probs_NJ = fused_NJ.exp()
    return _expectation(probs_NJ, fused_NJ) - _expectation(probs_NJ, model_NJ)


def _reverse_kl(model_NJ: Tensor, fused_NJ: Tensor, _beta: float) -> Tensor:
    present_NJ = model_NJ > -math.inf  # exp's gradient at -inf is 0 * inf; padded buckets must not enter it
    model_NJ = model_NJ.masked_fill(~present_NJ, 0.0)
    return (model_NJ.exp() * (model_NJ - fused_NJ.clamp_min(_FLOOR)) * present_NJ).sum(-1)


def _jsd(model_NJ: Tensor, fused_NJ: Tensor, beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence (Agarwal et al. 2024, equation 1), the fused row as teacher:
    beta KL(fused, m) + (1 - beta) KL(model, m), m = beta fused + (1 - beta) model."""
    present_NJ = model_NJ > -math.inf
    model_NJ = model_NJ.masked_fill(~present_NJ, 0.0)
    fused_NJ = fused_NJ.masked_fill(~present_NJ, 0.0)
    mixture_NJ = torch.logaddexp(model_NJ + math.log(1 - beta), fused_NJ + math.log(beta))
    of_model_NJ = model_NJ.exp() * (model_NJ - mixture_NJ) * present_NJ
    of_fused_NJ = torch.where(fused_NJ > -math.inf, fused_NJ.exp() * (fused_NJ - mixture_NJ), 0.0) * present_NJ
    return ((1 - beta) * of_model_NJ + beta * of_fused_NJ).sum(-1)


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def bucket_divergence(
    model_NJ: Tensor, fused_NJ: Tensor, loss: FusionLoss, temperature: float, beta: float = 0.5
) -> Tensor:
    """Return the divergence per row in nats, times temperature^2 (Hinton et al. 2015: keeps the gradient's scale).

    Args:
        model_NJ: log-probabilities of the target model over the buckets; gradients flow here.
        fused_NJ: log-probabilities of the fused rows; need not sum to one exactly (float16 on the wire).
        loss: name of the divergence of `FUSION_LOSSES`.
        temperature: above 0.
        beta: of `jsd`, between 0 and 1, where it tends to forward KL (beta -> 0) and reverse KL (beta -> 1), each times
            a factor that vanishes with it.
    """
    if temperature != 1.0:
        model_NJ = torch.log_softmax(model_NJ / temperature, dim=-1)
    fused_NJ = torch.log_softmax(fused_NJ / temperature, dim=-1)
    return _DIVERGENCES[loss](model_NJ, fused_NJ, beta) * temperature**2
