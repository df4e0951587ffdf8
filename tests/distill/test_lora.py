"""LoRA where it could go wrong without a word: tied embeddings, and the experts of a mixture."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.distill.target.config import LoraConfig, TargetConfig
from services.distill.target.lora import add_lora
from services.distill.target.prepare import prepare_target
from services.models.weights import load_model
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def made(folder, model_type: str, **values: object):
    config = TargetConfig.model_validate(
        {
            "architecture": {"model_type": model_type} | SHAPE | values,
            "tokenizer": {"train": {"vocabulary_size": 300}},
        }
    )
    return prepare_target(config, [text.decode() for text in corpus(50)], folder / "target", seed=0)


@pytest.mark.parametrize("modules", [["q_proj", "embed_tokens"], ["lm_head", "q_proj"], r".*(q_proj|embed_tokens)"])
def test_adapters_on_tied_embeddings_are_refused(tmp_path, modules):
    model = load_model(made(tmp_path, "llama", tie_word_embeddings=True))
    with pytest.raises(
        ValueError, match=r"distill\.lora\.target_modules: embeddings and lm_head of this model are one"
    ):
        add_lora(model, LoraConfig(target_modules=modules), seed=0, adapter=None)


def answers(folder) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = folder(torch.arange(3, 40)[None]).logits
    return logits


@pytest.mark.parametrize(
    ("values", "modules"),
    [
        ({"tie_word_embeddings": False}, ["q_proj", "embed_tokens"]),
        ({"tie_word_embeddings": True}, "all-linear"),
    ],
    ids=["untied embeddings", "tied, linear layers"],
)
def test_adapter_and_merged_model_answer_alike(tmp_path, values, modules):
    target = made(tmp_path, "llama", **values)
    job = job_in(tmp_path / "run", target, epochs=1, lora={"rank": 4, "target_modules": modules}, learning_rate=1e-2)
    train(job, FakeFusion(target, corpus(18)))
    untouched = AutoModelForCausalLM.from_pretrained(target)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), str(job.files.adapter))
    merged = AutoModelForCausalLM.from_pretrained(job.files.model)
    torch.testing.assert_close(answers(merged), answers(adapted), rtol=1e-4, atol=1e-4)
    assert (answers(merged) - answers(untouched)).abs().max() > 0.01


def test_experts_without_adapters_are_named(tmp_path, caplog):
    target = made(tmp_path, "qwen3_moe", **EXPERTS)
    with caplog.at_level(logging.WARNING):
        add_lora(load_model(target), LoraConfig(target_modules=["q_proj"]), seed=0, adapter=None)
    assert "the experts have no adapters and stay as they are: model.layers.*.mlp.experts.gate_up_proj" in caplog.text


def test_experts_with_adapters_learn_and_merge(tmp_path, caplog):
    target = made(tmp_path, "qwen3_moe", **EXPERTS)
    job = job_in(tmp_path / "run", target, epochs=1, lora={"rank": 4}, learning_rate=1e-2)
    with caplog.at_level(logging.WARNING):
        train(job, FakeFusion(target, corpus(18)))
    assert "have no adapters" not in caplog.text
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target), str(job.files.adapter))
    merged = AutoModelForCausalLM.from_pretrained(job.files.model)
    torch.testing.assert_close(answers(merged), answers(adapted), rtol=1e-4, atol=1e-4)
    before = dict(AutoModelForCausalLM.from_pretrained(target).state_dict())
    after = dict(merged.state_dict())
    for name, weight in before.items():
        if "experts" in name:
            assert not torch.equal(weight, after[name])
