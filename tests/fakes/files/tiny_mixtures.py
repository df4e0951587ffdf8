"""Folders of tiny mixtures of experts with random weights, one for each family that both engines know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.fakes.tiny_model import make_tiny_model

_SHAPE = {
    "vocab_size": 400, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "tie_word_embeddings": False,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_FINE = {"num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True}
_LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": 48, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
"""Attention over a latent state, of the one size that vLLM has a kernel for on a CPU: 512 + 64."""
_DEEPSEEK = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "routed_scaling_factor": 1.5,
}  # fmt: skip

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": _FINE | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _FINE | {"head_dim": 32},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "deepseek_v2": _DEEPSEEK | _LATENT | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": _DEEPSEEK | _LATENT | {"norm_topk_prob": True, "num_mtp_layers": 0, "topk_method": "noaux_tc"},
    "granitemoe": {"num_local_experts": 8, "logits_scaling": 0.5, "residual_multiplier": 0.7},
    "glm4_moe": _DEEPSEEK | {"head_dim": 32, "norm_topk_prob": True, "num_mtp_layers": 0, "use_qk_norm": True},
}
"""Settings by model_type."""
LATENT = ("deepseek_v2", "deepseek_v3")
"""Families with latent attention, which vLLM computes wrongly on a CPU; such sources are refused."""
REFUSED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"qkv_bias": False},
    "olmoe": {"norm_topk_prob": True},
    "deepseek_v2": {"norm_topk_prob": True},
}
"""Changes that vLLM does not honour; such folders are refused."""


def write_mixture(folder: Path, model_type: str, **changes: Any) -> Path:
    """Write a model of a family; the same every time. Biases that choose experts are not zero."""
    make_tiny_model(folder, vocabulary_size=400, seed=2)
    size = len(AutoTokenizer.from_pretrained(folder))
    config = AutoConfig.for_model(model_type, **(_SHAPE | MIXTURES[model_type] | {"vocab_size": size} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith(("bias", "gate.weight")):
                    tensor.copy_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    return folder
