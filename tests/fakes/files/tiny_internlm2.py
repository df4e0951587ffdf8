"""Random InternLM2 checkpoints of some thousand weights, in the published layout, with a real SentencePiece model.

Names, shapes and files are those of the published checkpoints; nothing of the conversion is used.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from tests.fakes.tiny_model import sentences
from tests.fakes.tokenizers import CORPUS

CHAT_TOKENS = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>",
)  # fmt: skip
"""At the last six ids, where the SentencePiece model has unused pieces."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNUSED = 10


@cache
def sentencepiece_model(*, vocab_size: int = 700, dummy_prefix: bool = False, user_defined: bool = True) -> bytes:
    """A BPE model with byte fallback as InternLM2's, its last pieces `[UNUSED_TOKEN_0]` to `[UNUSED_TOKEN_9]`."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS * 3, *sentences(20_000, seed=3).split("\n")]),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size - UNUSED,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n\n", "▁▁▁▁"] if user_defined else [],
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    kind = proto.SentencePiece.USER_DEFINED if user_defined else proto.SentencePiece.NORMAL
    lowest = min(piece.score for piece in proto.pieces)
    for number in range(UNUSED):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{number}]", score=lowest - 1 - number, type=kind)
    return proto.SerializeToString()


def processor(folder: Path) -> SentencePieceProcessor:
    """SentencePiece itself, on the model of a folder."""
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def tokenizer_config(model: bytes, *, chat: bool) -> dict[str, Any]:
    """The published tokenizer_config.json; a base model's has the three first ids only."""
    size = len(sentencepiece_model_pb2.ModelProto.FromString(model).pieces)
    added = dict(enumerate(("<unk>", "<s>", "</s>")))
    added |= dict(enumerate(CHAT_TOKENS, start=size - len(CHAT_TOKENS))) if chat else {}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token_id): {"content": name, **flags} for token_id, name in added.items()},
        **({"additional_special_tokens": list(CHAT_TOKENS), "chat_template": CHAT_TEMPLATE} if chat else {}),
        "auto_map": {
            "AutoTokenizer": [
                "tokenization_internlm2.InternLM2Tokenizer",
                "tokenization_internlm2_fast.InternLM2TokenizerFast",
            ]
        },
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }


def config(**changes: Any) -> dict[str, Any]:
    """The published config.json with small sizes."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "model_type": "internlm2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": 700,
        "pretraining_tp": 1,
        **changes,
    }


def tensors(values: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names; norms are near one."""
    generator = torch.Generator().manual_seed(seed)
    D, F, V = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    fused = groups * (heads // groups + 2) * (D // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (V, D)}
    for number in range(values["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {f"{layer}attention.wqkv.weight": (fused, D), f"{layer}attention.wo.weight": (D, D)}
        if values["bias"]:
            shapes |= {f"{layer}attention.wqkv.bias": (fused,), f"{layer}attention.wo.bias": (D,)}
        shapes |= {f"{layer}feed_forward.{name}.weight": (F, D) for name in ("w1", "w3")}
        shapes |= {f"{layer}feed_forward.w2.weight": (D, F)}
        shapes |= {f"{layer}{name}.weight": (D,) for name in ("attention_norm", "ffn_norm")}
    shapes["model.norm.weight"] = (D,)
    if not values["tie_word_embeddings"]:
        shapes["output.weight"] = (V, D)
    dtype = getattr(torch, values["torch_dtype"])
    return {
        name: (torch.randn(shape, generator=generator) * 0.15 + ("norm" in name)).to(dtype)
        for name, shape in shapes.items()
    }


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1, pickled: bool = False) -> None:
    """Write the weights in so many files, with an index where there are several."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names, weight_map = list(weights), dict[str, str]()
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        content = {name: weights[name] for name in part}
        torch.save(content, folder / file) if pickled else save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def write_checkpoint(
    folder: Path,
    *,
    shards: int = 1,
    pickled: bool = False,
    chat: bool = True,
    model: bytes | None = None,
    **changes: Any,
) -> Path:
    """Write a whole folder, keys of config.json by keyword; returns it."""
    folder.mkdir(parents=True)
    values, model = config(**changes), model or sentencepiece_model()
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(model, chat=chat), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [2, values["vocab_size"] - 2], "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_weights(folder, tensors(values), shards=shards, pickled=pickled)
    return folder
