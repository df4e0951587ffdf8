"""The forward pass of InternLM2 over the published layout, written out; the oracle of the conversion.

It reads the original files, one layer at a time, in float64, and shares nothing with the conversion but the reading of
weight files. After the InternLM2 technical report (arXiv 2403.17297) and its published model code.

Shape legend: B texts, L tokens, D hidden size, G groups of heads, g query heads of a group, h width of a head.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.models.internlm2.shards import WeightFiles


@torch.no_grad()
def reference_logits(folder: Path, ids_BL: Tensor) -> Tensor:
    """Return float64 [B, L, V]: the logits of an InternLM2 folder behind each token."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = WeightFiles(folder)

    def weight(name: str) -> Tensor:
        return files.tensor(name).double()

    def linear(x: Tensor, name: str) -> Tensor:
        bias = f"{name}.bias"
        return functional.linear(x, weight(f"{name}.weight"), weight(bias) if bias in files.shapes else None)

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.get("rms_norm_eps", 1e-6))
            * weight(f"{name}.weight")
        )

    turns = _rotations(config, ids_BL.shape[1])
    x_BLD = files.tensor("model.tok_embeddings.weight")[ids_BL].double()
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        qkv = linear(norm(x_BLD, f"{layer}.attention_norm"), f"{layer}.attention.wqkv")
        x_BLD = x_BLD + linear(_attention(qkv, config, turns), f"{layer}.attention.wo")
        y_BLD = norm(x_BLD, f"{layer}.ffn_norm")
        gated = functional.silu(linear(y_BLD, f"{layer}.feed_forward.w1"))
        x_BLD = x_BLD + linear(gated * linear(y_BLD, f"{layer}.feed_forward.w3"), f"{layer}.feed_forward.w2")
    x_BLD = norm(x_BLD, "model.norm")
    return linear(x_BLD, "model.tok_embeddings" if config.get("tie_word_embeddings") else "output")


def _rotations(config: dict[str, Any], length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [L, h] of the rotary embedding, for texts of one length."""
    width = config["hidden_size"] // config["num_attention_heads"]
    base, positions_L = float(config.get("rope_theta", 10_000)), torch.arange(length).double()
    scaling, trained = config.get("rope_scaling") or {}, config.get("max_position_embeddings", 2048)
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind == "linear":
        positions_L = positions_L / scaling["factor"]
    if kind == "dynamic" and length > trained:
        stretch = scaling["factor"] * length / trained - (scaling["factor"] - 1)
        base *= stretch ** (width / (width - 2))
    frequencies = base ** -(torch.arange(0, width, 2).double() / width)
    angles_Lh = torch.outer(positions_L, frequencies).repeat(1, 2)
    return angles_Lh.cos(), angles_Lh.sin()


def _attention(qkv: Tensor, config: dict[str, Any], turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return [B, L, D], causal attention; `qkv` holds group by group g query heads, a key head and a value head."""
    B, L, _ = qkv.shape
    heads = config["num_attention_heads"]
    G = config.get("num_key_value_heads") or heads
    g, h = heads // G, config["hidden_size"] // heads
    qkv_BLGnh = qkv.view(B, L, G, g + 2, h)
    q_BLGgh, k_BLGh, v_BLGh = qkv_BLGnh[..., :g, :], qkv_BLGnh[..., g, :], qkv_BLGnh[..., g + 1, :]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    cos_Lh, sin_Lh = turns
    q_BLGgh = turned(q_BLGgh, cos_Lh[:, None, None], sin_Lh[:, None, None])
    k_BLGh = turned(k_BLGh, cos_Lh[:, None], sin_Lh[:, None])
    scores = torch.einsum("blGgh,bmGh->bGglm", q_BLGgh, k_BLGh) / math.sqrt(h)
    scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bGglm,bmGh->blGgh", scores.softmax(-1), v_BLGh).reshape(B, L, -1)
