"""GGUF files of a few kilobytes, written as llama.cpp's converter writes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import regex
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTROL, NORMAL, USER_DEFINED, BYTE = 3, 1, 4, 6
PROBE = "The quick brown fox jumps over the lazy dog. Water is made of hydrogen and oxygen."


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


SMOLLM_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM_MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "ĠĠ Ġ", "ĠĠ ĠĠ", "a b", "i n", "Ċ Ċ", "1 2", "Ġ 1"]
"""The last two would join digits: SmolLM2 has no such merge, but they show whether digits are split off first."""


def smollm_pieces() -> list[str]:
    return [*SMOLLM_CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in SMOLLM_MERGES)]


def encode_smollm(text: str) -> list[int]:
    """Byte-level BPE by the book, after llama.cpp's rule for `smollm`: every number character stands alone."""
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    rank = {tuple(merge.split(" ")): index for index, merge in enumerate(SMOLLM_MERGES)}
    ids = {piece: index for index, piece in enumerate(smollm_pieces())}
    alphabet = byte_alphabet()
    found: list[int] = []
    for chunk in regex.split(r"(\p{N})", text):
        for word in words.findall(chunk):
            symbols = [alphabet[byte] for byte in word.encode()]
            while pairs := [(rank[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in rank]:
                at = min(pairs)[1]
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found += [ids[symbol] for symbol in symbols]
    return found


def write_smollm(path: Path, *, train: bool) -> LlamaForCausalLM:
    """A one-layer Llama with a tokenizer of SmolLM2's kind; returns the model. Trained, it knows the probe by heart."""
    pieces = smollm_pieces()
    model = _tiny_llama(len(pieces))
    if train:
        _learn_the_probe(model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny smollm")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(pieces) - 3))
    writer.add_token_merges(SMOLLM_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    _add_weights(writer, model)
    _finish(writer)
    return model


def _tiny_llama(vocabulary_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _learn_the_probe(model: LlamaForCausalLM) -> None:
    ids = torch.tensor([[1, *encode_smollm(PROBE)]])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


_LLAMA_CPP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def _add_weights(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        short = name.replace("model.layers.0.", "blk.0.")
        for ours, theirs in _LLAMA_CPP_NAMES.items():
            short = short.replace(ours, theirs)
        writer.add_tensor(short, np.ascontiguousarray(array))


GEMMA_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
GEMMA_USER_DEFINED = ["\n", "\n\n", "  ", "   ", "    ", "\t\t", "<table>"]
GEMMA_MERGED = ["▁t", "he", "▁the", "in", "▁in", "ab", "ing", "12"]


def gemma_pieces() -> tuple[list[str], list[int], list[float]]:
    """Pieces, token types and scores, laid out as in Gemma: runs of spaces stand there as spaces."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *".,<>'\"_", "▁", "é"]
    pieces = [*GEMMA_CONTROL, *GEMMA_USER_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256)), *GEMMA_MERGED, *letters]
    special = len(GEMMA_CONTROL) + len(GEMMA_USER_DEFINED) + 256
    kinds = [CONTROL] * 5 + [USER_DEFINED] * len(GEMMA_USER_DEFINED) + [BYTE] * 256
    kinds += [NORMAL] * (len(pieces) - special)
    scores = [-1000.0] * special + [-float(rank) for rank in range(len(pieces) - special)]
    return pieces, kinds, scores


def write_gemma(path: Path) -> None:
    """The tokenizer of a Gemma file, with just enough metadata around it to be read; no weights."""
    pieces, kinds, scores = gemma_pieces()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny gemma")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_tensor("token_embd.weight", np.zeros((len(pieces), 32), dtype=np.float32))
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
