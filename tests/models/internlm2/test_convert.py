"""Converted weights against the published layout's own forward pass, back again bit by bit, and refused folders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.models.internlm2 import convert
from services.models.internlm2.convert import to_internlm2, to_llama
from services.models.internlm2.reference import reference_logits
from services.models.pretrained import load_causal_lm
from tests.fakes.files.tiny_internlm2 import config, tensors, write_checkpoint, write_weights

SHAPES: list[dict[str, Any]] = [
    {"num_key_value_heads": 4, "shards": 1},  # groups of one query head
    {"num_key_value_heads": 2, "shards": 2, "bias": True, "rope_scaling": None},
    {"num_key_value_heads": 1, "shards": 5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"num_key_value_heads": 2, "shards": 5, "tie_word_embeddings": True, "num_hidden_layers": 3},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "shards": 2, "pickled": True, "rope_theta": 5000.0},
    {"num_key_value_heads": 2, "shards": 1, "torch_dtype": "bfloat16"},
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(folder: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_causal_lm(folder, dtype=torch.float32).eval()(input_ids=ids_BL).logits
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_the_reference_s_and_the_way_back_is_bit_equal(tmp_path: Path, shape: dict[str, Any]) -> None:
    original = write_checkpoint(tmp_path / "original", **shape)
    to_llama(original, tmp_path / "llama")
    llama = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert llama["model_type"] == "llama" and "auto_map" not in llama
    assert len(list((tmp_path / "llama").glob("model*.safetensors"))) == shape["shards"]
    for length in (1, 40, 100):  # 100: beyond max_position_embeddings, where dynamic scaling begins
        ids_BL = torch.randint(700, (2, length), generator=torch.Generator().manual_seed(length))
        expected = reference_logits(original, ids_BL)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits(tmp_path / "llama", ids_BL).double(), expected, atol=1e-5, rtol=0)

    to_internlm2(tmp_path / "llama", tmp_path / "back", check=True)
    before = tensors(config(**{key: value for key, value in shape.items() if key not in {"shards", "pickled"}}))
    after = weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert json_or_bytes(tmp_path / "back" / name) == json_or_bytes(original / name)


def json_or_bytes(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_the_reference_reads_group_by_group(tmp_path: Path) -> None:
    """One layer by hand: with one position attention is the value head, written out per query head."""
    values = config(num_key_value_heads=2, num_hidden_layers=1)
    weights = {name: tensor.double() for name, tensor in tensors(values).items()}
    fused = weights["model.layers.0.attention.wqkv.weight"].view(2, 4, 8, 32)  # groups, q q k v, width, hidden

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * weights[name]

    x = weights["model.tok_embeddings.weight"][17]
    inner = norm(x, "model.layers.0.attention_norm.weight")
    heads = torch.cat([fused[head // 2, 3] @ inner for head in range(4)])
    x = x + weights["model.layers.0.attention.wo.weight"] @ heads
    inner = norm(x, "model.layers.0.ffn_norm.weight")
    gate, up = (weights[f"model.layers.0.feed_forward.{name}.weight"] @ inner for name in ("w1", "w3"))
    x = x + weights["model.layers.0.feed_forward.w2.weight"] @ (gate * torch.sigmoid(gate) * up)
    expected = weights["output.weight"] @ norm(x, "model.norm.weight")

    (tmp_path / "config.json").write_text(json.dumps(values))
    write_weights(tmp_path, tensors(values))
    found = reference_logits(tmp_path, torch.tensor([[17]]))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_a_model_trained_from_a_converted_one_goes_back(tmp_path: Path) -> None:
    """Saved by transformers, in shards of another size, with another RoPE base and type of weights."""
    original = write_checkpoint(tmp_path / "original", shards=2)
    to_llama(original, tmp_path / "llama")
    model = load_causal_lm(tmp_path / "llama", dtype=torch.float32)
    model.config.rope_parameters["rope_theta"] = 2e6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    (tmp_path / "trained" / "tokenizer.json").write_bytes((tmp_path / "llama" / "tokenizer.json").read_bytes())

    with pytest.raises(ValueError, match="--original"):
        to_internlm2(tmp_path / "trained", tmp_path / "back")
    to_internlm2(tmp_path / "trained", tmp_path / "back", original)
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values == config(rope_theta=2e6, torch_dtype="bfloat16")
    ids_BL = torch.arange(60).view(2, 30)
    expected = logits(tmp_path / "trained", ids_BL).double()
    torch.testing.assert_close(reference_logits(tmp_path / "back", ids_BL), expected, atol=1e-5, rtol=0)


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


WQKV, OUTPUT = "model.layers.1.attention.wqkv.weight", "output.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'"),
        ({"architectures": ["InternLM2ForRewardModel"]}, r"architectures is \['InternLM2ForRewardModel'\]"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type: Input should be 'linear' or 'dynamic'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1}}, "rope_scaling.alpha: Extra inputs"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
        ({"hidden_size": 0}, "hidden_size: Input should be greater than 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 699}, "vocab_size 699, the tokenizer has 700 ids"),
        ({"intermediate_size": 47}, r"layers.0.feed_forward.w1.weight is \[48, 32\], by config.json it is \[47, 32\]"),
        ({"num_key_value_heads": 4}, r"layers.0.attention.wqkv.weight is \[64, 32\], by config.json it is \[96, 32\]"),
        ({"bias": True}, "tensor model.layers.0.attention.wqkv.bias is missing"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.attention.wo.weight belongs to no such model"),
        (lambda weights: weights.pop(WQKV), f"tensor {WQKV} is missing"),
        (lambda weights: weights.update(v_head=torch.ones(3)), "tensor v_head belongs to no such model"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    original = write_checkpoint(tmp_path / "original")
    if callable(change):
        change_weights(original, change)
    else:
        (original / "config.json").write_text(json.dumps(config(**change)))
    with pytest.raises(ValueError, match=message) as raised:
        to_llama(original, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_files_that_are_missing_or_hold_code_are_refused(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", shards=2)
    shard = original / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00002-of-00002.*: cannot be read"):
        to_llama(original, tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002.* is missing, which model.*index"):
        to_llama(original, tmp_path / "out")
    for path in original.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        to_llama(original, tmp_path / "out")
    torch.save({OUTPUT: subprocess.Popen}, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: holds more than tensors, which is never run"):
        to_llama(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_model_with_another_output_matrix_is_refused(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", tie_word_embeddings=True)
    embedding = "model.tok_embeddings.weight"
    change_weights(original, lambda weights: weights.update({OUTPUT: weights[embedding].clone()}))
    to_llama(original, tmp_path / "same")
    assert "lm_head.weight" not in weights_of(tmp_path / "same")
    change_weights(original, lambda weights: weights[OUTPUT].neg_())
    with pytest.raises(ValueError, match=r"tensor output\.weight is not model\.tok_embeddings\.weight"):
        to_llama(original, tmp_path / "other")


def test_the_way_back_refuses_what_internlm2_cannot_express(tmp_path: Path) -> None:
    to_llama(write_checkpoint(tmp_path / "original"), tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    values = json.loads(file.read_text())
    for change, message in (
        ({"model_type": "qwen2"}, "model_type is 'qwen2', expected llama"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"head_dim": 16}, "head_dim 16 is not hidden_size / num_attention_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.type"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.self_attn.q_proj.weight is missing"),
    ):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            to_internlm2(tmp_path / "llama", tmp_path / "back")
    file.write_text(json.dumps(values))
    tokenizer = tmp_path / "llama" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|other|>"))
    with pytest.raises(ValueError, match="its ids are not those of"):
        to_internlm2(tmp_path / "llama", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_verification_finds_swapped_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_checkpoint(tmp_path / "original")
    done = to_llama(original, tmp_path / "right", check=True)
    assert done.verified and done.verified.tokenizer
    assert done.verified.difference < 1e-5 and done.verified.largest > 1
    monkeypatch.setattr(convert, "split_wqkv", lambda fused, config: fused.split([32, 16, 16]))  # not interleaved
    with pytest.raises(ValueError, match="logits differ from the reference's"):
        to_llama(original, tmp_path / "wrong", check=True)
    assert not (tmp_path / "wrong").exists()


def test_a_killed_conversion_leaves_no_folder_and_one_that_exists_is_never_touched(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", shards=3)
    program = f"""
import os, signal
from pathlib import Path
from services.models.internlm2 import shards
from services.models.internlm2.convert import to_llama
write = shards.save_file
def save_file(tensors, path, metadata):
    if "00002" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata)
shards.save_file = save_file
to_llama(Path({str(original)!r}), Path({str(tmp_path / "out")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    to_llama(original, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        to_llama(original, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
