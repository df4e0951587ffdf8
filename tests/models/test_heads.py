"""The lm_head of every architecture: the loss of training is the model's own, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.distill.data.batch import Batch
from services.distill.target.module import DistillModule
from services.models.weights import check_head

VOCABULARY = 96
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY, "initializer_range": 0.5}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

EQUAL = {
    "llama": SIZES,
    "llama, tied": SIZES | {"tie_word_embeddings": True},
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | MOE,
    "olmo": SIZES,
    "olmo2": SIZES,
    "olmo3": SIZES | {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": SIZES | MOE,
    "gemma": SIZES,
    "gemma2, no cap": SIZES | {"final_logit_softcapping": None},
    "gemma3_text": SIZES,
    "phi3": SIZES | {"original_max_position_embeddings": 64},
    "granite": SIZES | {"logits_scaling": 1.0},
    "cohere, scale 1": SIZES | {"logit_scale": 1.0},
    "smollm3": SIZES,
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "glm": SIZES,
    "glm4": SIZES,
    "exaone4": SIZES | {"layer_types": ["full_attention"] * 2},
    "ernie4_5": SIZES,
    "hunyuan_v1_dense": SIZES,
    "nemotron": SIZES,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZES,
    "falcon": SIZES,
    "apertus": SIZES,
    "falcon_h1, multiplier 1": SIZES | MAMBA | {"lm_head_multiplier": 1.0},
}
REFUSED = {
    "falcon_h1": (SIZES | MAMBA | {"lm_head_multiplier": 0.3}, "differ by 0.7 of the largest"),
    "gemma2": (SIZES | {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "gemma3_text, capped": (SIZES | {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "cohere": (SIZES, "logit_scale = 0.0625"),
    "granite": (SIZES | {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    "minicpm3": (SIZES | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                          "v_head_dim": 8, "dim_model_base": 8, "num_key_value_heads": 2}, "logits_scaling = 4.0"),
    "cpmant": (SIZES | {"dim_ff": 48, "dim_head": 16}, "lets a token see those behind it"),
    "phi": (SIZES, "it has a bias"),
    "gptj": ({**GPT, "rotary_dim": 8}, "it has a bias"),
}  # fmt: skip


def made(name: str, values: dict[str, object]):
    """A model of some thousand random weights; keys that its configuration does not have are left out."""
    kind = name.partition(",")[0]
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    config = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key in known})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def losses(model) -> tuple[float, float]:
    """The loss that training takes, and the model's own, over one window behind its BOS."""
    tokens = torch.tensor([1, 5, 9, 3, 60, 7, 7, 42, 11])
    length = len(tokens) - 1
    batch = Batch(
        inputs_BL=tokens[None, :-1],
        positions_BL=torch.arange(length)[None],
        valid_BL=torch.ones(1, length, dtype=torch.bool),
        token_ids_N=tokens[1:],
        rows=None,
    )
    with torch.no_grad():
        ours = DistillModule(model, vocabulary_size=VOCABULARY)(batch, torch.ones(length), None).clm_N.mean()
        logits = model(input_ids=tokens[None]).logits[0, :-1, :VOCABULARY].float()
    return float(ours), float(torch.nn.functional.cross_entropy(logits, tokens[1:]))


@pytest.mark.parametrize("name", EQUAL)
def test_the_loss_is_the_model_s_own(name):
    model = made(name, EQUAL[name])
    check_head(model)
    ours, theirs = losses(model)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_does_more_is_refused(name):
    values, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_head(made(name, values))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere", "granite"])
def test_a_cap_or_scale_is_measured_whatever_it_is_called(name, monkeypatch):
    """Also where untrained logits are far below the cap."""
    caps = {"final_logit_softcapping": 30.0, "logit_scale": 0.5, "logits_scaling": 2.0}
    model = made(name, SIZES | caps | {"initializer_range": 0.01})
    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_: object())
    with pytest.raises(ValueError, match="differ by"):
        check_head(model)


def test_the_check_leaves_the_model_as_it_was():
    model = made("llama", SIZES).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_head(model)
    assert model.training and not model.get_output_embeddings()._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
