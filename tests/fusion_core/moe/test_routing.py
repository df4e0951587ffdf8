"""The recorder of routers against what transformers itself says of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusion_core.moe.routing import RouterRecorder, routing_sums
from tests.fusion_core.moe.dense_models import dense_model, ids

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe"])
def test_logits_are_those_that_the_model_shows_also_with_checkpointing(model_type):
    count = "num_local_experts" if model_type == "mixtral" else "num_experts"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE, **{count: 8}))
    recorder = RouterRecorder(model)
    assert (recorder.layers, recorder.num_experts, recorder.num_active) == ([0, 1, 2], 8, 2)
    shown = model(ids(), output_router_logits=True).router_logits
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with recorder.recording() as outputs:
            loss = model(ids(), labels=ids()).loss
        assert len(outputs) == 3
        for (logits, indices), expected in zip(outputs, shown, strict=True):
            torch.testing.assert_close(logits, expected.view_as(logits))
            assert torch.equal(indices, expected.view_as(logits).float().softmax(-1).topk(2).indices)
        sums = routing_sums(outputs, torch.ones(3, 40, dtype=torch.bool))
        (loss + 0.1 * sums.probabilities_LE.pow(2).sum()).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_dense_model_has_no_routers():
    assert RouterRecorder(dense_model("llama, tied, whole heads")).layers == []


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_routers_with_a_sigmoid_and_biases(model_type):
    """Probabilities are sigmoids over their sum, and a bias that grows draws tokens to its expert."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    shape = SHAPE | latent | {"num_key_value_heads": 2, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, first_k_dense_replace=1))
    recorder = RouterRecorder(model)
    assert (recorder.layers, recorder.num_experts, recorder.num_active) == ([1, 2], 8, 2)

    def sums():
        with recorder.recording() as outputs, torch.no_grad():
            model(ids())
        return outputs, recorder.sums(outputs, torch.ones(3, 40, dtype=torch.bool))

    outputs, before = sums()
    scores = outputs[0][0].double().sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(before.probabilities_LE[0].double(), shares.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before.entropy_L[0], -(shares * shares.log()).sum(), rtol=1e-5, atol=1e-5)
    load_LE = before.counts_LE / before.counts_LE.mean(dim=1, keepdim=True)
    recorder.move_biases(load_LE, 0.25)
    biases = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in model.model.layers[1:]])
    assert torch.equal(biases, 0.25 * torch.sign(1 - load_LE).float())
    _, after = sums()
    assert (after.counts_LE[0, load_LE[0] < 1] > before.counts_LE[0, load_LE[0] < 1]).all()
