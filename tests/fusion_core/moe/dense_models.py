"""Tiny dense decoders with random weights: the shapes that can become a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

DENSE: dict[str, dict[str, Any]] = {
    "llama, tied, whole heads": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama, untied, groups": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral, untied, one group": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": None},
    "qwen2, biases, tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2, biases, untied, scaled positions": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
}


def dense_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of `DENSE`, its biases not zero and its logits of the size of a trained model's."""
    config = AutoConfig.for_model(**(_SHAPE | DENSE[name] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                scale = 0.5 if parameter_name.endswith("bias") or parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def ids(num_rows: int = 3, length: int = 40) -> torch.Tensor:
    """Token ids, the same every time."""
    return torch.randint(3, 61, (num_rows, length), generator=torch.Generator().manual_seed(1))
