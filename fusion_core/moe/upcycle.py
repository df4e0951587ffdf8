"""A dense decoder as a mixture of experts that computes the same function (DeepSeekMoE's shape, Qwen2-MoE's weights).

The feed-forward block of a layer is a sum over its I hidden units, FFN(x) = sum_i down_i * silu(gate_i x) * (up_i x),
so it is also the sum of n shards with I / n units each (fine-grained experts, Dai et al. 2024, equations 6 to 8). A
layer of Qwen2-MoE computes, with w = softmax(W x) of the top k experts e, normalised to sum 1,

    sigmoid(g x) * SHARED(x) + sum over e of w_e * EXPERT_e(x)

With g = 0 the gate of the shared expert is 1/2, so its `down` is doubled. Two ways to fill in the rest (`init`):

    residual   SHARED is the whole FFN, and the `down` of every routed expert is zero. No routing changes the function.
    split      SHARED is the first s shards; each of the k = n - s others is a routed expert, c times over. The k
               experts of a copy have the same router row, so that the top k are one whole copy with w = 1 / k, and
               `down` is multiplied by k. Exact as long as the rows of a copy stay equal (see `router.py`).

Routers compute the softmax in float32, whatever the model's dtype: w = 1 / k is exact for k = 2, else within 2e-7.

Shape legend: D hidden size, I intermediate size, W = I / n width of an expert, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Init = Literal["residual", "split"]

COPIES_KEY = "router_copies"
"""Key of config.json: the number of copies whose experts share a router row; only a split model has it."""
_DENSE = ("llama", "mistral", "qwen2")
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Keys of config.json that keep their value."""
_MULTIPLE = 8
"""Unit of an expert's width: torch's grouped products take rows of whole 16 bytes, 8 values of bfloat16."""


@dataclass(frozen=True, slots=True)
class Upcycling:
    """The shape of the mixture; names of errors are those of the settings.

    Attributes:
        shards: equal parts of a layer's feed-forward block, n.
        shared: shards of them that the shared expert holds (split), s; with residual it holds all.
        copies: routed experts for each of the other n - s shards, c.
        init: see the module.
        dense_layers: the first so many layers stay dense.
        router_std: standard deviation of the router's rows.
    """

    shards: int = 8
    shared: int = 2
    copies: int = 4
    init: Init = "residual"
    dense_layers: int = 0
    router_std: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.shared < self.shards:
            raise ValueError(f"shared: must be from 1 to shards - 1 = {self.shards - 1}, got {self.shared}")

    @property
    def num_active(self) -> int:
        """The number of routed experts that a token is sent to, k."""
        return self.shards - self.shared

    @property
    def num_experts(self) -> int:
        """The number of routed experts of a layer, E."""
        return self.copies * self.num_active


def check_dense(config: Mapping[str, Any], upcycling: Upcycling) -> None:
    """Raise ValueError naming what this `config.json` has that the mixture could not compute.

    Both transformers and vLLM must read the result: vLLM's Qwen2-MoE has no sliding window, and takes hidden size by
    heads as the size of a head.
    """
    kind = config.get("model_type")
    if kind not in _DENSE:
        raise ValueError(f"a model of type {kind} cannot become a mixture of experts, only {', '.join(_DENSE)}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key}: a {kind} with biases of this kind cannot become a mixture of experts")
    if config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act: only silu can become a mixture of experts, the model has {config['hidden_act']}")
    size = config["hidden_size"] / config["num_attention_heads"]
    if config.get("head_dim") not in {None, size}:
        raise ValueError(f"head_dim: must be hidden_size / num_attention_heads = {size:g}, got {config['head_dim']}")
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    if window is not None and window < positions:
        raise ValueError(
            f"sliding_window: attention over {window} of {positions} positions cannot be kept; set sliding_window to "
            f"null and max_position_embeddings to {window} in config.json where texts are no longer"
        )
    intermediate = config["intermediate_size"]
    if intermediate % (_MULTIPLE * upcycling.shards):
        raise ValueError(
            f"shards: must cut intermediate_size = {intermediate} into equal parts that are a multiple of {_MULTIPLE}, "
            f"got {upcycling.shards}"
        )
    if upcycling.dense_layers >= config["num_hidden_layers"]:
        raise ValueError(
            f"dense_layers: must be below the {config['num_hidden_layers']} layers, got {upcycling.dense_layers}"
        )


def upcycled_config(config: Mapping[str, Any], upcycling: Upcycling) -> dict[str, Any]:
    """Return the arguments of transformers' `Qwen2MoeConfig` for the mixture; ValueError as `check_dense`."""
    check_dense(config, upcycling)
    width = config["intermediate_size"] // upcycling.shards
    residual = upcycling.init == "residual"
    return {
        **{key: config[key] for key in _SAME if key in config},
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": upcycling.num_experts,
        "num_experts_per_tok": upcycling.num_active,
        "norm_topk_prob": True,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": config["intermediate_size"] if residual else upcycling.shared * width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(upcycling.dense_layers)),
        "use_sliding_window": False,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.0,
        **({} if residual else {COPIES_KEY: upcycling.copies}),
    }


def upcycled_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any], upcycling: Upcycling, *, seed: int
) -> dict[str, Tensor]:
    """Return the weights of transformers' `Qwen2MoeForCausalLM` from those of the dense model.

    Args:
        state: the dense model's, by name; tensors that stay as they are share its memory.
        config: the dense model's `config.json`.
        upcycling: the shape.
        seed: of the router's rows.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {name: weight for name, weight in state.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        for projection in ("q_proj", "k_proj", "v_proj"):  # vLLM's Qwen2-MoE reads biases, zeros where there are none
            weight = state[f"{here}self_attn.{projection}.weight"]
            made.setdefault(f"{here}self_attn.{projection}.bias", weight.new_zeros(weight.shape[0]))
        gate_ID, up_ID, down_DI = (state[f"{here}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        if layer < upcycling.dense_layers:
            experts = {"gate_proj.weight": gate_ID, "up_proj.weight": up_ID, "down_proj.weight": down_DI}
        else:
            experts = _experts(gate_ID, up_ID, down_DI, upcycling)
            experts["gate.weight"] = _router_rows(gate_ID, upcycling, generator)
        made |= {f"{here}mlp.{name}": weight for name, weight in experts.items()}
    return made


def _experts(gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, upcycling: Upcycling) -> dict[str, Tensor]:
    """Return the weights of a layer's experts; routed ones stand copy by copy, in each one shard by shard."""
    (intermediate, hidden), shards, shared = gate_ID.shape, upcycling.shards, upcycling.shared
    width = intermediate // shards
    residual = upcycling.init == "residual"
    shared_width = intermediate if residual else shared * width
    gate_nWD, up_nWD = gate_ID.view(shards, width, hidden)[shared:], up_ID.view(shards, width, hidden)[shared:]
    down_nDW = down_DI.view(hidden, shards, width).transpose(0, 1)[shared:]
    down_nDW = torch.zeros_like(down_nDW) if residual else down_nDW * upcycling.num_active
    return {
        "experts.gate_up_proj": torch.cat([gate_nWD, up_nWD], dim=1).repeat(upcycling.copies, 1, 1),
        "experts.down_proj": down_nDW.repeat(upcycling.copies, 1, 1),
        "shared_expert.gate_proj.weight": gate_ID[:shared_width].clone(),
        "shared_expert.up_proj.weight": up_ID[:shared_width].clone(),
        "shared_expert.down_proj.weight": down_DI[:, :shared_width] * 2,
        "shared_expert_gate.weight": gate_ID.new_zeros(1, hidden),
    }


def _router_rows(like_ID: Tensor, upcycling: Upcycling, generator: torch.Generator) -> Tensor:
    """Return random rows, [E, D]: a row for each expert, or with split one for each copy."""
    rows = upcycling.num_experts if upcycling.init == "residual" else upcycling.copies
    drawn = torch.randn(rows, like_ID.shape[1], generator=generator) * upcycling.router_std
    if upcycling.init == "split":
        drawn = drawn.repeat_interleave(upcycling.num_active, dim=0)
    return drawn.to(like_ID)
