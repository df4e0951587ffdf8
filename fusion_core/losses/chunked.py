"""CLM and fusion loss straight from hidden states and lm_head, a chunk of tokens at a time.

The logits of a chunk live in two buffers that all chunks share; the gradient is formed in the forward pass, in place
of the probabilities, so that neither [N, V] logits nor a dense target ever exist and nothing is computed twice.

With p the model's distribution, S a row's support and m = sum of p outside S, every loss here is a function of the
K + 1 bucket log-probabilities (log p_k for k in S, log m). For gradients a_k and b with respect to those,

    dL/dz_j = a_j - p_j (sum a + b)                  for j in S
    dL/dz_j = p_j (b / m - sum a - b)                for j outside S

so that the dense part is one multiplication per row, and the support one scatter of K values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_core.losses.buckets import FUSION_LOSSES, FusionLoss, bucket_divergence
from fusion_core.losses.rows import SparseRows

_CHUNK_ELEMENTS = 1 << 24
"""Number of logits per chunk: 64 MiB of float32."""
_PRODUCT_ELEMENTS = 1 << 24
"""Elements of the largest temporary for the lm_head's gradient, where its type is not the product's."""


class Losses(NamedTuple):
    """Result of `fused_losses`.

    Attributes:
        total: scalar, sum over rows of clm_weight * clm + fusion_weight * fusion; gradients flow from here.
        clm_N: nats per row, without gradient.
        fusion_N: nats per row, without gradient; 0 where masked; None without fused rows.
    """

    total: Tensor
    clm_N: Tensor
    fusion_N: Tensor | None


def fused_losses(
    hidden_ND: Tensor,
    head_VD: Tensor,
    token_ids_N: Tensor,
    rows: SparseRows | None,
    *,
    clm_weights_N: Tensor,
    fusion_weights_N: Tensor | None = None,
    loss: FusionLoss = "cross_entropy",
    temperature: float = 1.0,
    beta: float = 0.5,
    vocabulary_size: int | None = None,
    chunk_tokens: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Losses:
    """Return the losses of N tokens; row n of every argument belongs to the prediction of token n.

    Args:
        hidden_ND: last hidden states, at the positions *before* each token (the first one is the BOS position).
        head_VD: weight of the lm_head; may have more rows than the vocabulary (padding), which then take no part.
        token_ids_N: int64, the realised tokens.
        rows: fused distributions, or None for CLM only.
        clm_weights_N: weight of every row's CLM term, lambda and the normaliser included.
        fusion_weights_N: weight of every row's fusion term; rows that are masked count nothing. Required with rows.
        loss: divergence between fused row and model; see `fusion_core.losses.buckets`.
        temperature: for the fusion term.
        beta: of `jsd`, between 0 and 1.
        vocabulary_size: number of ids; all rows of the lm_head when not set.
        chunk_tokens: tokens per chunk; by default as many as make 64 MiB of logits, or as much as the hidden states
            take if that is more (so that the lm_head's gradient is not read and written too often).
        compute_dtype: type of the three matrix products (logits, and the two gradients); that of the hidden states when
            not set. In bfloat16 they accumulate in float32 and round their result. The softmax, the losses and the sum
            of the lm_head's gradient over chunks are float32 at least, and gradients have the type of their input.
    """
    if loss not in FUSION_LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(FUSION_LOSSES)}, got {loss!r}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta}")
    if (rows is None) != (fusion_weights_N is None):
        raise ValueError("fusion_weights_N: required with rows, and only then")
    size = head_VD.shape[0] if vocabulary_size is None else vocabulary_size
    if not 0 < size <= head_VD.shape[0]:
        raise ValueError(f"vocabulary_size: expected 1 to {head_VD.shape[0]} (rows of the lm_head), got {size}")
    num_tokens, width = hidden_ND.shape
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // size, num_tokens * width // size)
    total, clm_N, fusion_N = _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
        hidden_ND,
        head_VD,
        token_ids_N,
        rows,
        clm_weights_N,
        fusion_weights_N,
        _Plan(
            loss,
            temperature,
            beta,
            vocabulary_size=size,
            chunk_tokens=min(chunk, max(1, num_tokens)),
            compute_dtype=compute_dtype or hidden_ND.dtype,
        ),
    )
    return Losses(total=total, clm_N=clm_N, fusion_N=None if rows is None else fusion_N)


@dataclass(frozen=True, slots=True)
class _Plan:
    loss: FusionLoss
    temperature: float
    beta: float
    vocabulary_size: int
    chunk_tokens: int
    compute_dtype: torch.dtype


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_ND: Tensor,
        head_VD: Tensor,
        token_ids_N: Tensor,
        rows: SparseRows | None,
        clm_weights_N: Tensor,
        fusion_weights_N: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        num_tokens = hidden_ND.shape[0]
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        used_VD = head_VD[: plan.vocabulary_size].to(plan.compute_dtype)
        clm_weights_N = clm_weights_N.to(dtype)
        clm_N = hidden_ND.new_zeros(num_tokens, dtype=dtype)
        fusion_N = hidden_ND.new_zeros(num_tokens, dtype=dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        # The accumulator is float32 whatever the weights are: chunks add up.
        grad_head_VD = torch.zeros_like(head_VD, dtype=dtype) if need_head else None
        # All chunks share these: fresh pages for every chunk would cost more than the arithmetic on them.
        logits_buffer_CV = used_VD.new_empty((plan.chunk_tokens, plan.vocabulary_size))
        probs_buffer_CV = torch.empty_like(logits_buffer_CV, dtype=dtype)

        for start in range(0, num_tokens, plan.chunk_tokens):
            stop = min(start + plan.chunk_tokens, num_tokens)
            hidden_CD = hidden_ND[start:stop].to(plan.compute_dtype)
            logits_CV = torch.mm(hidden_CD, used_VD.T, out=logits_buffer_CV[: stop - start])
            probs_CV = probs_buffer_CV[: stop - start]
            torch.log_softmax(logits_CV, dim=-1, dtype=dtype, out=probs_CV)
            tokens_C1 = token_ids_N[start:stop, None]
            clm_N[start:stop] = -probs_CV.gather(1, tokens_C1)[:, 0]
            weights_C1 = clm_weights_N[start:stop, None]
            if rows is None:
                probs_CV.exp_()
                grad_CV = probs_CV.mul_(weights_C1)
            else:
                assert fusion_weights_N is not None
                fusion_N[start:stop], grad_CV = _fusion_chunk(
                    probs_CV, rows.slice(start, stop), weights_C1, fusion_weights_N[start:stop].to(dtype), plan
                )
            grad_CV.scatter_add_(1, tokens_C1, -weights_C1)
            if grad_CV.dtype != plan.compute_dtype:
                grad_CV = logits_CV.copy_(grad_CV)
            if grad_hidden_ND is not None:
                _write_product(grad_hidden_ND[start:stop], grad_CV, used_VD)
            if grad_head_VD is not None:
                _add_product(grad_head_VD[: plan.vocabulary_size], grad_CV.T, hidden_CD)

        total = (clm_N * clm_weights_N).sum()
        if fusion_weights_N is not None:
            total = total + (fusion_N * fusion_weights_N).sum()
        ctx.used = False
        ctx.save_for_backward(grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(clm_N, fusion_N)
        return total, clm_N, fusion_N

    @staticmethod
    def backward(ctx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        if ctx.used:
            raise RuntimeError("fused_losses: the gradient is formed once and given away; call it again instead")
        ctx.used = True
        # In place: a second copy of the lm_head's gradient would be the largest tensor of the step.
        grads = [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*grads, *([None] * 5))


def _write_product(result_CD: Tensor, left_CV: Tensor, right_VD: Tensor) -> None:
    if result_CD.dtype == left_CV.dtype:
        torch.mm(left_CV, right_VD, out=result_CD)
    else:
        result_CD.copy_(left_CV @ right_VD)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a matrix product: without a temporary where the types allow it, else with small ones."""
    if sum_VD.dtype == left_VC.dtype:
        sum_VD.addmm_(left_VC, right_CD)
        return
    step = max(1, _PRODUCT_ELEMENTS // right_CD.shape[1])
    for first in range(0, len(sum_VD), step):
        sum_VD[first : first + step] += left_VC[first : first + step] @ right_CD


def _fusion_chunk(
    logprobs_CV: Tensor, rows: SparseRows, clm_weights_C1: Tensor, fusion_weights_C: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Return the fusion loss per row, and the gradient with respect to the logits, which overwrites `logprobs_CV`. It
    lacks the CLM term's -weight on the realised token."""
    dtype = logprobs_CV.dtype
    mask_C1 = rows.mask_N[:, None]
    present_CK = (rows.ids_NK >= 0) & mask_C1
    ids_CK = rows.ids_NK.masked_fill(~present_CK, 0)
    support_CK = logprobs_CV.gather(1, ids_CK).masked_fill(~present_CK, -math.inf)
    probs_CV = logprobs_CV.exp_()
    support_probs_CK = probs_CV.gather(1, ids_CK).masked_fill(~present_CK, 0.0)
    # Taking the support out of the row and adding up the rest is exact; 1 - sum(support) would cancel.
    probs_CV.scatter_add_(1, ids_CK, -support_probs_CK)
    outside_C1 = probs_CV.sum(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)

    # Masked rows get a tail of one and no support, so that they stay finite whatever they hold.
    fused_CJ = torch.cat([rows.logprobs_NK, rows.tail_N[:, None]], dim=1).to(dtype)
    fused_CJ = torch.cat([fused_CJ[:, :-1].masked_fill(~present_CK, -math.inf), fused_CJ[:, -1:]], dim=1)
    fused_CJ[:, -1:].masked_fill_(~mask_C1, 0.0)
    weights_C = fusion_weights_C.masked_fill(~rows.mask_N, 0.0)
    with torch.enable_grad():
        model_CJ = torch.cat([support_CK, outside_C1.log()], dim=1).detach().requires_grad_()
        fusion_C = bucket_divergence(model_CJ, fused_CJ, plan.loss, plan.temperature, plan.beta)
        (grad_CJ,) = torch.autograd.grad((fusion_C * weights_C).sum(), model_CJ)
    grad_CJ = grad_CJ.masked_fill(~torch.isfinite(model_CJ), 0.0)
    sum_C1 = grad_CJ.sum(dim=1, keepdim=True)

    probs_CV.mul_(grad_CJ[:, -1:] / outside_C1 - sum_C1 + clm_weights_C1)
    on_support_CK = grad_CJ[:, :-1] + support_probs_CK * (clm_weights_C1 - sum_C1)
    probs_CV.scatter_add_(1, ids_CK, on_support_CK.masked_fill(~present_CK, 0.0))
    return fusion_C.detach().masked_fill(~rows.mask_N, 0.0), probs_CV
