"""The balance losses against values computed by hand, finite differences, and transformers' pooled loss."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from fusion_core.moe.balance import device_balance, expert_balance
from fusion_core.moe.routing import describe, routing_sums

ALL = torch.ones(1, 4, dtype=torch.bool)


def routed(*choices: list[int], num_experts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that send token t to `choices[t]` with all their probability in equal parts, and these indices."""
    indices = torch.tensor(choices)
    logits = torch.full((len(choices), num_experts), -1e9, dtype=torch.float64)
    return logits.scatter(1, indices, 0.0), indices


def losses(*layers: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    sums = routing_sums(list(layers), ALL)
    num_active = layers[0][1].shape[1]
    return expert_balance(sums.counts_LE, sums.probabilities_LE, num_tokens=4, num_active=num_active).tolist()


def test_values_by_hand():
    assert losses(routed([0], [1], [2], [3])) == pytest.approx([1.0])
    assert losses(routed([0, 1], [1, 2], [2, 3], [3, 0])) == pytest.approx([1.0])
    assert losses(routed([2], [2], [2], [2])) == pytest.approx([4.0])  # E / k
    assert losses(routed([0, 1], [0, 1], [0, 1], [0, 1])) == pytest.approx([2.0])
    # Three tokens to expert 0 and one to 1: f = 4/4 * (3, 1), P = (3/4, 1/4).
    assert losses(routed([0], [0], [0], [1])) == pytest.approx([3 * 0.75 + 1 * 0.25])


def test_two_half_collapsed_layers_are_seen_where_a_pooled_loss_is_content():
    first, second = routed([0], [1], [0], [1]), routed([2], [3], [2], [3])
    assert losses(first, second) == pytest.approx([2.0, 2.0])
    pooled = load_balancing_loss_func((first[0], second[0]), num_experts=4, top_k=1)
    assert float(pooled) == pytest.approx(1.0)


def test_groups_by_hand():
    """Experts 0 and 1 are one group, 2 and 3 the other."""
    sums = routing_sums([routed([0], [0], [1], [2])], ALL)
    sizes = {"num_tokens": 4, "num_active": 1}
    # f = (2, 1, 1, 0): f' = (1.5, 0.5); P = (1/2, 1/4, 1/4, 0): P' = (3/4, 1/4).
    [loss] = device_balance(sums.counts_LE, sums.probabilities_LE, **sizes, num_groups=2).tolist()
    assert loss == pytest.approx(1.5 * 0.75 + 0.5 * 0.25)
    [even] = device_balance(sums.counts_LE, sums.probabilities_LE, **sizes, num_groups=1).tolist()
    assert even == pytest.approx(1.0)
    with pytest.raises(ValueError, match="groups: must divide the 4 experts of a layer, got 3"):
        device_balance(sums.counts_LE, sums.probabilities_LE, **sizes, num_groups=3)


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 6, (8, 2), generator=generator)
    mask = torch.rand(2, 4, generator=generator) < 0.7
    counts_LE = routing_sums([(torch.zeros(8, 6), indices)], mask).counts_LE

    def loss(logits: torch.Tensor) -> torch.Tensor:
        sums = routing_sums([(logits, indices)], mask)
        sizes = {"num_tokens": float(mask.sum()), "num_active": 2}
        one = expert_balance(counts_LE, sums.probabilities_LE, **sizes)
        return one + 0.5 * device_balance(counts_LE, sums.probabilities_LE, **sizes, num_groups=3)

    logits = torch.randn(8, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, logits)
    loss(logits).sum().backward()
    assert not logits.grad[~mask.reshape(-1)].any()


def test_parts_of_a_batch_add_up_and_masked_tokens_are_left_out():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3 * 5, 8, generator=generator)
    indices = logits.topk(2).indices
    mask = torch.rand(3, 5, generator=generator) < 0.6
    whole = routing_sums([(logits, indices)], mask)
    alone = routing_sums([(logits[mask.reshape(-1)], indices[mask.reshape(-1)])], mask.new_ones(1, int(mask.sum())))
    parts = [routing_sums([(logits[i : i + 5], indices[i : i + 5])], mask[i // 5]) for i in (0, 5, 10)]
    for name in ("counts_LE", "entropy_L", "probabilities_LE"):
        torch.testing.assert_close(getattr(alone, name), getattr(whole, name))
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert float(whole.counts_LE.sum()) == 2 * int(mask.sum())


def test_figures_by_hand():
    counts_LE = torch.tensor([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    figures = describe(counts_LE, torch.tensor([8 * 1.5, 0.0]), 8)
    assert figures["load_cv"] == pytest.approx([0.0, 3**0.5])
    assert figures["dead_experts"] == [0, 3]
    assert figures["router_entropy"] == pytest.approx([1.5, 0.0])
