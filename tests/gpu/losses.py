"""Losses and gradients on the device against dense float64 formulas on the CPU.

Shapes: N tokens, D hidden size, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_core.losses import SparseRows, fused_losses
from fusion_core.losses.buckets import FUSION_LOSSES, FusionLoss, bucket_divergence
from tests.bench.parts.report import Report

_N, _D, _K = 512, 128, 16


def check(report: Report, device: torch.device, *, quick: bool) -> None:
    for loss in FUSION_LOSSES:
        expected = _dense(loss, 5003)  # type: ignore[arg-type]
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            found = _sparse(loss, 5003, device, dtype)  # type: ignore[arg-type]
            names = ("value", "gradient of the hidden states", "gradient of the lm_head")
            errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
            name = str(dtype).removeprefix("torch.")
            report.row(table="losses", loss=loss, products=name, **dict(zip(names, errors, strict=True)))
            report.check(f"{loss}, products in {name}: largest relative error", max(errors), "", at_most=bound)


def _inputs(vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor, SparseRows, Tensor, Tensor]:
    """Return hidden states, lm_head, tokens, fused rows and the two weights of every token, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(_N, _D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(vocabulary_size, _D, generator=generator, dtype=torch.float64) / _D**0.5
    token_ids_N = torch.randint(vocabulary_size, (_N,), generator=generator)
    ids_NK = torch.rand(_N, vocabulary_size, generator=generator).topk(_K, dim=1).indices
    fused_NJ = torch.randn(_N, _K + 1, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    mask_N = torch.arange(_N) % 7 != 0
    rows = SparseRows(ids_NK, fused_NJ[:, :_K].contiguous(), fused_NJ[:, _K].contiguous(), mask_N)
    clm_N, fusion_N = (torch.rand(_N, generator=generator, dtype=torch.float64) / _N for _ in range(2))
    return hidden_ND, head_VD, token_ids_N, rows, clm_N, fusion_N


def _dense(loss: FusionLoss, vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by all logits at once and autograd."""
    hidden_ND, head_VD, token_ids_N, rows, clm_N, fusion_N = _inputs(vocabulary_size)
    hidden_ND.requires_grad_()
    head_VD.requires_grad_()
    logprobs_NV = (hidden_ND @ head_VD.T).log_softmax(dim=1)
    support_NV = torch.zeros(logprobs_NV.shape, dtype=torch.bool).scatter_(1, rows.ids_NK, True)
    rest_N = logprobs_NV.masked_fill(support_NV, -torch.inf).logsumexp(dim=1)
    model_NJ = torch.cat([logprobs_NV.gather(1, rows.ids_NK), rest_N[:, None]], dim=1)
    fused_NJ = torch.cat([rows.logprobs_NK, rows.tail_N[:, None]], dim=1)
    clm = -(clm_N * logprobs_NV.gather(1, token_ids_N[:, None])[:, 0]).sum()
    fusion = (fusion_N * rows.mask_N * bucket_divergence(model_NJ, fused_NJ, loss, temperature=1.0, beta=0.5)).sum()
    total = clm + fusion
    total.backward()  # type: ignore[no-untyped-call]
    assert hidden_ND.grad is not None
    assert head_VD.grad is not None
    return total.detach(), hidden_ND.grad, head_VD.grad


def _sparse(
    loss: FusionLoss, vocabulary_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by the loss of the trainer: float32 on the device, matrix products in `dtype`."""
    hidden_ND, head_VD, token_ids_N, rows, clm_N, fusion_N = _inputs(vocabulary_size)
    hidden_ND, head_VD = (x.float().to(device).requires_grad_() for x in (hidden_ND, head_VD))
    there = SparseRows(
        rows.ids_NK.to(device), rows.logprobs_NK.float().to(device), rows.tail_N.float().to(device),
        rows.mask_N.to(device),
    )  # fmt: skip
    total = fused_losses(
        hidden_ND,
        head_VD,
        token_ids_N.to(device),
        there,
        clm_weights_N=clm_N.float().to(device),
        fusion_weights_N=fusion_N.float().to(device),
        loss=loss,
        compute_dtype=dtype,
    ).total
    total.backward()  # type: ignore[no-untyped-call]
    assert hidden_ND.grad is not None
    assert head_VD.grad is not None
    return total.detach(), hidden_ND.grad, head_VD.grad
