"""A dense decoder by the formulas of the textbooks, in float64 and without a library's layers, against transformers.

The page docs/experts.md points here: `feed_forward` is the sum over hidden units that upcycling cuts into experts.

Shape legend: T tokens, D hidden size, H heads, G groups of keys and values, S size of a head, I intermediate size.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.fusion_core.moe.dense_models import dense_model, ids

Weights = dict[str, Tensor]


def softmax(scores: Tensor) -> Tensor:
    """exp(s) over its sum, along the last axis; minus the largest one first, so that no exponential overflows."""
    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return powers / powers.sum(dim=-1, keepdim=True)


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019: x over its root mean square, times a gain."""
    return gain_D * x_TD / torch.sqrt((x_TD**2).mean(dim=-1, keepdim=True) + eps)


def rotated(x_TS: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al. 2021): the pair (j, j + S/2) of position t turns by the angle t * theta^(-2j/S)."""
    tokens, size = x_TS.shape
    angles = torch.arange(tokens)[:, None] * theta ** (-2.0 * torch.arange(size // 2, dtype=torch.float64) / size)
    first, second = x_TS.split(size // 2, dim=-1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def head_attention(query_TS: Tensor, key_TS: Tensor, value_TS: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(S)) V, where the mask lets a token see itself and the past only (Vaswani et al. 2017)."""
    tokens, size = query_TS.shape
    scores_TT = query_TS @ key_TS.T / math.sqrt(size)
    future_TT = torch.arange(tokens)[None, :] > torch.arange(tokens)[:, None]
    return softmax(scores_TT.masked_fill(future_TT, -math.inf)) @ value_TS


def attention(x_TD: Tensor, w: Weights, *, heads: int, groups: int, theta: float) -> Tensor:
    """Several heads side by side; heads / groups of them share keys and values (Ainslie et al. 2023)."""
    size = x_TD.shape[1] // heads
    project = {
        name: x_TD @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", torch.zeros(1, dtype=x_TD.dtype))
        for name in "qkv"
    }
    queries, keys, values = (project[name].split(size, dim=1) for name in "qkv")
    answers = [
        head_attention(rotated(query, theta), rotated(keys[h * groups // heads], theta), values[h * groups // heads])
        for h, query in enumerate(queries)
    ]
    return torch.cat(answers, dim=1) @ w["o_proj.weight"].T


def feed_forward(x_TD: Tensor, w: Weights) -> Tensor:
    """SwiGLU (Shazeer 2020), a sum over hidden units i: down_i * silu(gate_i x) * (up_i x)."""
    gate_TI, up_TI = x_TD @ w["gate_proj.weight"].T, x_TD @ w["up_proj.weight"].T
    hidden_TI = gate_TI / (1 + torch.exp(-gate_TI)) * up_TI
    return sum(
        (hidden_TI[:, i, None] * w["down_proj.weight"][:, i] for i in range(hidden_TI.shape[1])),
        start=torch.zeros_like(x_TD),
    )


def decoder(model, tokens_T: Tensor) -> Tensor:
    """Logits, [T, V]: embeddings, layers that add to what they read, a last norm, and the lm_head."""
    config, state = model.config, {name: weight.double() for name, weight in model.state_dict().items()}

    def weights(prefix: str) -> Weights:
        return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}

    x_TD = state["model.embed_tokens.weight"][tokens_T]
    for layer in range(config.num_hidden_layers):
        w = weights(f"model.layers.{layer}.")
        x_TD = x_TD + attention(
            rms_norm(x_TD, w["input_layernorm.weight"], config.rms_norm_eps),
            weights(f"model.layers.{layer}.self_attn."),
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            theta=config.rope_parameters["rope_theta"],
        )
        x_TD = x_TD + feed_forward(
            rms_norm(x_TD, w["post_attention_layernorm.weight"], config.rms_norm_eps),
            weights(f"model.layers.{layer}.mlp."),
        )
    return rms_norm(x_TD, state["model.norm.weight"], config.rms_norm_eps) @ state["lm_head.weight"].T


@pytest.mark.parametrize(
    "name", ["llama, tied, whole heads", "llama, untied, groups", "mistral, untied, one group", "qwen2, biases, tied"]
)
def test_the_decoder_is_what_the_formulas_say(name):
    """Within the float32 in which transformers computes norms and angles even of a float64 model; logits reach 7."""
    model = dense_model(name, dtype=torch.float64)
    for tokens_T in ids(num_rows=2):
        with torch.no_grad():
            expected = model(tokens_T[None]).logits[0]
        torch.testing.assert_close(decoder(model, tokens_T), expected, rtol=0, atol=2e-4)


def test_softmax_survives_large_scores():
    assert torch.equal(softmax(torch.tensor([1e4, 1e4, -math.inf])), torch.tensor([0.5, 0.5, 0.0]))
