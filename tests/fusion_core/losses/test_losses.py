"""Losses and gradients against a dense float64 oracle that builds what the library never builds: full logits, dense
target rows and buckets by boolean masks, differentiated by autograd.

Shapes: N rows, K candidates, V vocabulary, P rows of the padded lm_head, D hidden size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_core.losses import FUSION_LOSSES, SparseRows, fused_losses
from tests.fakes.product_types import ProductTypes


def random_rows(generator: torch.Generator, n: int, k: int, v: int, dtype: torch.dtype) -> SparseRows:
    """Rows as a stream delivers them: rising padding, some without a tail, some masked and then full of rubbish."""
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)]) if k else torch.zeros(n, 0).long()
    logprobs = torch.log_softmax(torch.randn(n, k + 1, generator=generator, dtype=torch.float64) * 2, dim=1)
    lengths = torch.randint(1 if k else 0, k + 1, (n, 1), generator=generator)
    padded = torch.arange(k)[None] >= lengths
    ids = ids.masked_fill(padded, -1)
    logprobs = torch.cat([logprobs[:, :k].masked_fill(padded, -math.inf), logprobs[:, k:]], dim=1)
    if k:
        logprobs[torch.rand(n, generator=generator) < 0.3, k] = -math.inf
    logprobs = torch.log_softmax(logprobs, dim=1)
    mask = torch.rand(n, generator=generator) < 0.8
    logprobs[~mask] = float("nan")
    return SparseRows(ids, logprobs[:, :k].to(dtype), logprobs[:, k].to(dtype), mask)


def oracle(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    rows: SparseRows | None,
    loss: str,
    temperature: float,
    size: int,
    beta: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """CLM and fusion loss per row, dense, from the definitions."""
    logprobs = torch.log_softmax(hidden @ head[:size].T, dim=1)
    clm = -logprobs[torch.arange(len(tokens)), tokens]
    if rows is None:
        return clm, torch.zeros_like(clm)
    fusion = []
    for row, kept in enumerate(rows.mask_N.tolist()):
        if not kept:
            fusion.append(torch.zeros((), dtype=clm.dtype))
            continue
        ids = [i for i in rows.ids_NK[row].tolist() if i >= 0]
        rest = [i for i in range(size) if i not in set(ids)]
        p = torch.cat([logprobs[row, ids].exp(), logprobs[row, rest].exp().sum()[None]])
        q = torch.cat([rows.logprobs_NK[row, : len(ids)].double(), rows.tail_N[row].double()[None]]).exp()
        p, q = p ** (1 / temperature), q ** (1 / temperature)
        p, q = p / p.sum(), q / q.sum()
        on_q = q > 0
        if loss == "cross_entropy":
            value = -(q[on_q] * p[on_q].log()).sum()
        elif loss == "forward_kl":
            value = (q[on_q] * (q[on_q] / p[on_q]).log()).sum()
        elif loss == "reverse_kl":
            on_p = p > 0
            value = (p[on_p] * (p[on_p].log() - q[on_p].log().clamp_min(-20.0))).sum()
        else:
            m, on_p = (1 - beta) * p + beta * q, p > 0
            of_p, of_q = (p[on_p] * (p[on_p] / m[on_p]).log()).sum(), (q[on_q] * (q[on_q] / m[on_q]).log()).sum()
            value = (1 - beta) * of_p + beta * of_q
        fusion.append(value * temperature**2)
    return clm, torch.stack(fusion)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 9),
    v=st.integers(2, 13),
    padding=st.integers(0, 3),
    k=st.integers(0, 12),
    chunk=st.integers(1, 10),
    loss=st.sampled_from(FUSION_LOSSES),
    temperature=st.sampled_from([0.5, 1.0, 1.0, 2.0]),
    beta=st.sampled_from([0.5, 0.1, 0.9]),
    lambda_=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_values_and_gradients_equal_the_dense_oracle(seed, n, v, padding, k, chunk, loss, temperature, beta, lambda_):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(v + padding, 4, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, v, (n,), generator=generator)
    rows = random_rows(generator, n, min(k, v - 1), v, torch.float64)
    clm_weights = torch.rand(n, generator=generator, dtype=torch.float64) * lambda_
    fusion_weights = torch.rand(n, generator=generator, dtype=torch.float64) * (1 - lambda_)

    losses = fused_losses(
        hidden, head, tokens, rows,
        clm_weights_N=clm_weights, fusion_weights_N=fusion_weights,
        loss=loss, temperature=temperature, beta=beta, vocabulary_size=v, chunk_tokens=chunk,
    )  # fmt: skip
    clm, fusion = oracle(hidden, head, tokens, rows, loss, temperature, v, beta)
    expected = (clm * clm_weights).sum() + (fusion * fusion_weights).sum()

    torch.testing.assert_close(losses.clm_N, clm.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses.fusion_N, fusion.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses.total, expected, rtol=1e-9, atol=1e-9)
    # A factor after the loss (accumulation, scaling) must reach the gradient.
    ours = torch.autograd.grad(losses.total * 3.0, (hidden, head))
    theirs = torch.autograd.grad(expected * 3.0, (hidden, head))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9)
    assert not ours[1][v:].any(), "padded rows of the lm_head take no part"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_support_that_is_the_whole_vocabulary_is_plain_distillation(temperature):
    """Without a tail the bucket temperature is the usual one: softmax of logits over temperature on both sides."""
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(5, 4, generator=generator).double(), torch.randn(7, 4, generator=generator).double()
    teacher = torch.randn(5, 7, generator=generator).double()
    rows = SparseRows(
        torch.arange(7).expand(5, 7), torch.log_softmax(teacher, 1), torch.full((5,), -math.inf), torch.ones(5).bool()
    )
    ones = torch.ones(5, dtype=torch.float64)
    losses = fused_losses(
        hidden, head, torch.zeros(5).long(), rows,
        clm_weights_N=0 * ones, fusion_weights_N=ones, loss="forward_kl", temperature=temperature,
    )  # fmt: skip
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(hidden @ head.T / temperature, 1), torch.softmax(teacher / temperature, 1), reduction="sum"
    )
    torch.testing.assert_close(losses.total, expected * temperature**2)


@pytest.mark.parametrize("loss", FUSION_LOSSES)
def test_the_gradient_vanishes_where_the_model_equals_the_fused_row(loss):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 11, generator=generator).double()
    logprobs = torch.log_softmax(logits, 1)
    top = logprobs.topk(4, dim=1)
    tail = torch.log1p(-top.values.exp().sum(1))
    rows = SparseRows(top.indices, top.values, tail, torch.ones(6).bool())
    hidden = logits.clone().requires_grad_()
    ones = torch.ones(6, dtype=torch.float64)
    losses = fused_losses(
        hidden, torch.eye(11).double(), top.indices[:, 0], rows,
        clm_weights_N=0 * ones, fusion_weights_N=ones, loss=loss, temperature=2.0,
    )  # fmt: skip
    losses.total.backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-12


def test_a_tail_far_below_float32_resolution_keeps_its_value_and_gradient():
    """log(1 - sum of the support) would be log(0) here."""
    logits = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).requires_grad_()
    rows = SparseRows(
        torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]), torch.ones(1).bool()
    )
    one = torch.ones(1)
    losses = fused_losses(
        logits, torch.eye(4), torch.tensor([0]), rows, clm_weights_N=0 * one, fusion_weights_N=one
    )  # fmt: skip
    assert losses.total.item() == pytest.approx(0.5 * (40.0 - math.log(3.0)), rel=1e-6)
    losses.total.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.5, -1 / 6, -1 / 6, -1 / 6], rel=1e-5)


def test_bfloat16_states_with_float32_weights_stay_near_the_oracle():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(64, 32, generator=generator)
    head = torch.randn(50, 32, generator=generator) * 0.2
    tokens = torch.randint(0, 50, (64,), generator=generator)
    rows = random_rows(generator, 64, 8, 50, torch.float32)
    weights = torch.full((64,), 0.5 / 64)
    low = hidden.bfloat16().requires_grad_()
    full_head = head.clone().requires_grad_()
    losses = fused_losses(
        low, full_head, tokens, rows, clm_weights_N=weights, fusion_weights_N=weights, chunk_tokens=16
    )
    clm, fusion = oracle(hidden.double(), head.double(), tokens, rows, "cross_entropy", 1.0, 50)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(((clm + fusion) * weights).sum().item(), rel=1e-2)
    losses.total.backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert full_head.grad is not None and full_head.grad.dtype == torch.float32


def test_products_in_bfloat16_have_the_gradients_of_float32():
    """As under autocast: float32 states and weights, bfloat16 asked for."""
    generator = torch.Generator().manual_seed(8)
    n, d, v = 256, 64, 500
    states, weights = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) * 0.3
    tokens = torch.randint(0, v, (n,), generator=generator)
    rows = random_rows(generator, n, 16, v, torch.float32)
    scale = torch.full((n,), 0.5 / n)
    gradients, values, products = [], [], []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head = states.clone().requires_grad_(), weights.clone().requires_grad_()
        with ProductTypes() as recorded:
            losses = fused_losses(
                hidden, head, tokens, rows,
                clm_weights_N=scale, fusion_weights_N=scale, chunk_tokens=100, compute_dtype=dtype,
            )  # fmt: skip
        losses.total.backward()
        assert hidden.grad is not None and head.grad is not None
        assert hidden.grad.dtype == head.grad.dtype == losses.clm_N.dtype == torch.float32
        gradients.append((hidden.grad, head.grad))
        values.append(losses.total.item())
        products.append(recorded.types_with(v))
    assert products[0] and all(types == {torch.float32} for types in products[0])
    assert len(products[1]) == 3 * 3 and all(types == {torch.bfloat16} for types in products[1])
    assert values[1] == pytest.approx(values[0], rel=1e-3) and values[1] != values[0]
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() / exact.norm() < 1e-2


def test_clm_only_frozen_head_and_no_rows():
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(10, 4, generator=generator).requires_grad_()
    head = torch.randn(9, 4, generator=generator)
    tokens = torch.randint(0, 9, (10,), generator=generator)
    losses = fused_losses(hidden, head, tokens, None, clm_weights_N=torch.full((10,), 0.1), chunk_tokens=3)
    reference = torch.nn.functional.cross_entropy(hidden @ head.T, tokens)
    torch.testing.assert_close(losses.total, reference)
    assert losses.fusion_N is None
    torch.testing.assert_close(
        torch.autograd.grad(losses.total, hidden)[0], torch.autograd.grad(reference, hidden)[0], rtol=1e-5, atol=1e-6
    )
    nothing = torch.zeros(0, 4, requires_grad=True)
    empty = fused_losses(nothing, head, tokens[:0], None, clm_weights_N=torch.zeros(0))
    empty.total.backward()
    assert empty.total.item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "huber"}, "loss: expected one of cross_entropy"),
        ({"beta": 1.0}, "beta: expected a number between 0 and 1"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"vocabulary_size": 12}, "vocabulary_size: expected 1 to 9"),
        ({"fusion_weights_N": None}, "fusion_weights_N"),
    ],
)
def test_mistakes_name_the_argument(change, message):
    generator = torch.Generator().manual_seed(7)
    rows = random_rows(generator, 3, 2, 9, torch.float32)
    settings_ = {"clm_weights_N": torch.ones(3), "fusion_weights_N": torch.ones(3), **change}
    with pytest.raises(ValueError, match=message):
        fused_losses(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3).long(), rows, **settings_)


def test_a_gradient_that_was_given_away_is_not_given_twice():
    hidden = torch.randn(3, 4, requires_grad=True)
    losses = fused_losses(hidden, torch.randn(9, 4), torch.zeros(3).long(), None, clm_weights_N=torch.ones(3))
    losses.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        losses.total.backward()


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="tail: expected shape"):
        SparseRows(torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(2), torch.ones(3).bool())
