"""A dense model as a mixture of experts: the same function, in a folder that transformers and vLLM read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from fusion_core.moe.upcycle import Upcycling
from services.distill.target.config import MoeConfig
from services.distill.target.moe import as_mixture, check_moe, tie_copies, upcycle
from services.models.weights import check_head
from tests.fusion_core.moe.dense_models import DENSE, dense_model, ids

pytestmark = pytest.mark.usefixtures("one_thread")

# Two or four active experts: their weight is exact in the float32 of the routers.
SHAPES = {
    "residual": Upcycling(shards=6, shared=2, copies=3, router_std=1.0),
    "split": Upcycling(shards=6, shared=2, copies=3, init="split", router_std=1.0),
    "split, a dense layer": Upcycling(shards=3, shared=1, copies=5, init="split", dense_layers=1, router_std=1.0),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(ids()).logits
    return answer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dense", DENSE)
def test_the_mixture_computes_what_the_dense_model_does(dense, shape):
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        model = dense_model(dense, dtype=dtype)
        mixture = upcycle(model, shape, seed=0)
        mixture.set_experts_implementation("eager")  # the fast one has no float64
        expected = logits(model)
        assert expected.abs().max() > 3
        assert (logits(mixture) - expected).abs().max() < bound
    check_head(mixture)


@pytest.mark.parametrize("shape", [SHAPES["residual"], SHAPES["split"]], ids=["residual", "split"])
def test_a_saved_folder_is_the_same_model_again(tmp_path, shape):
    mixture = upcycle(dense_model("llama, tied, whole heads"), shape, seed=0)
    mixture.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_type == "qwen2_moe"
    assert set(again.state_dict()) == set(mixture.state_dict())
    for name, weight in mixture.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert torch.equal(logits(again.eval()), logits(mixture))
    stored = load_file(tmp_path / "model.safetensors")
    for projection in ("q_proj", "k_proj", "v_proj"):  # without them vLLM's scores are NaN
        assert not stored[f"model.layers.0.self_attn.{projection}.bias"].any()


def test_another_seed_draws_other_routers_and_changes_nothing_else():
    model, shape = dense_model("qwen2, biases, tied"), SHAPES["residual"]
    one, same, other = (upcycle(model, shape, seed=seed).state_dict() for seed in (0, 0, 1))
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) != name.endswith("mlp.gate.weight"), name


def test_no_routing_changes_a_residual_mixture_and_noise_breaks_a_split_one():
    model = dense_model("llama, untied, groups")
    for name, least, most in (("residual", 0.0, 1e-3), ("split", 0.1, 1e9)):
        mixture = upcycle(model, SHAPES[name], seed=0)
        with torch.no_grad():
            for layer in mixture.model.layers:
                layer.mlp.gate.weight += torch.randn_like(layer.mlp.gate.weight)
        assert least <= (logits(mixture) - logits(model)).abs().max() <= most


@pytest.mark.parametrize("init", ["residual", "split"])
def test_the_text_teaches_the_routers_of_a_residual_mixture_alone(init):
    """The experts of a copy are chosen with equal weights whatever their row is, so that it has no slope."""
    mixture = upcycle(dense_model("llama, tied, whole heads"), SHAPES[init], seed=0)
    tie_copies(mixture)
    with torch.no_grad():
        for layer in mixture.model.layers:  # routed experts that start with zero output would hide a slope
            layer.mlp.experts.down_proj += 0.1 * torch.randn_like(layer.mlp.experts.down_proj)
    mixture(ids(), labels=ids()).loss.backward()
    for layer in mixture.model.layers:
        slope = layer.mlp.gate.weight.grad.abs().max() / layer.mlp.shared_expert.down_proj.weight.grad.abs().max()
        assert slope > 1e-2 if init == "residual" else slope == 0


def test_tied_routers_route_alike_and_stay_where_they_are_without_a_balance_loss():
    torch.manual_seed(0)
    mixture = upcycle(dense_model("llama, tied, whole heads"), SHAPES["split"], seed=0)
    before = logits(mixture)
    tie_copies(mixture)
    torch.testing.assert_close(logits(mixture), before, rtol=0, atol=1e-4)
    started = [layer.mlp.gate.weight.detach().clone() for layer in mixture.model.layers]
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        mixture(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, rows in zip(mixture.model.layers, started, strict=True):
        assert torch.equal(layer.mlp.gate.weight, rows)  # no rounding has moved them
    # As any engine reads it: without the ties, and still whole copies.
    plain = type(mixture)(mixture.config).eval()
    plain.load_state_dict(mixture.state_dict())
    torch.testing.assert_close(logits(plain), logits(mixture), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"attention_bias": True}, SHAPES["split"], "attention_bias: "),
        ({"mlp_bias": True}, SHAPES["split"], "mlp_bias: "),
        ({"hidden_act": "gelu"}, SHAPES["split"], "hidden_act: only silu"),
        ({"head_dim": 16}, SHAPES["split"], r"head_dim: must be .* = 8, got 16"),
        (
            {},
            Upcycling(shards=7),
            "shards: must cut intermediate_size = 48 into equal parts that are a multiple of 8, got 7",
        ),
        ({}, Upcycling(shards=6, dense_layers=3), "dense_layers: must be below the 3 layers, got 3"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes, shape, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense_model("llama, untied, groups", **changes), shape, seed=0)


def test_other_models_and_windows_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="sliding_window: attention over 16 of 64 positions"):
        upcycle(dense_model("mistral, untied, one group", sliding_window=16), Upcycling(), seed=0)
    upcycle(dense_model("mistral, untied, one group", sliding_window=64), SHAPES["residual"], seed=0)
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type gpt2 cannot become a mixture of experts, only llama"):
        check_moe(tmp_path, MoeConfig())
    with pytest.raises(ValueError, match=r"shared: must be from 1 to shards - 1 = 3, got 4"):
        Upcycling(shards=4, shared=4)


def test_a_mixture_keeps_its_shape_and_takes_balance_only(tmp_path):
    mixture = upcycle(dense_model("llama, tied, whole heads"), SHAPES["residual"], seed=0)
    mixture.save_pretrained(tmp_path)
    check_moe(tmp_path, MoeConfig.model_validate({"balance": {"expert": 0.1, "device": 0.1, "groups": 6}}))
    assert as_mixture(mixture, MoeConfig(), seed=0) is mixture
    with pytest.raises(ValueError, match=r"distill\.moe: the target is a mixture of experts already"):
        check_moe(tmp_path, MoeConfig(copies=3))
    with pytest.raises(ValueError, match=r"groups: must divide the 12 experts of a layer, got 5"):
        check_moe(tmp_path, MoeConfig.model_validate({"balance": {"device": 0.1, "groups": 5}}))
