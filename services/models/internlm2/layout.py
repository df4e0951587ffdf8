"""The tensors of InternLM2's layout and of Llama's, and the fused matrix of queries, keys and values.

Shape legend: G groups of heads (one key and one value head each), g query heads of a group, h width of a head,
D hidden size, F intermediate size, V vocabulary size.

`wqkv` is [G * (g + 2) * h, D]: group by group, a group's query heads, then its key head, then its value head. The order
of values within a head is Llama's, so that the rotary embedding is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.models.internlm2.config import InternLM2Config

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the published layout, and those of Llama's that hold the same numbers: three for `wqkv`, else one."""

    published: str
    published_shape: Shape
    llama: tuple[str, ...]
    llama_shapes: tuple[Shape, ...]


def parts(config: InternLM2Config) -> Iterator[Part]:
    """Yield all tensors of a model in the order of its layers. A tied model has no output matrix of its own."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = D, config.num_key_value_heads * config.head_dim
    yield _same("model.tok_embeddings.weight", "model.embed_tokens.weight", (V, D))
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for kind, inner in (("weight", (D,)), ("bias", ())):
            if kind == "bias" and not config.bias:
                continue
            yield Part(
                f"{layer}attention.wqkv.{kind}",
                (queries + 2 * keys, *inner),
                tuple(f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv"),
                ((queries, *inner), (keys, *inner), (keys, *inner)),
            )
            yield _same(f"{layer}attention.wo.{kind}", f"{layer}self_attn.o_proj.{kind}", (D, *inner))
        for ours, theirs, shape in (("w1", "gate", (F, D)), ("w3", "up", (F, D)), ("w2", "down", (D, F))):
            yield _same(f"{layer}feed_forward.{ours}.weight", f"{layer}mlp.{theirs}_proj.weight", shape)
        yield _same(f"{layer}attention_norm.weight", f"{layer}input_layernorm.weight", (D,))
        yield _same(f"{layer}ffn_norm.weight", f"{layer}post_attention_layernorm.weight", (D,))
    yield _same("model.norm.weight", "model.norm.weight", (D,))
    if not config.tie_word_embeddings:
        yield _same("output.weight", "lm_head.weight", (V, D))


def _same(published: str, llama: str, shape: Shape) -> Part:
    return Part(published, shape, (llama,), (shape,))


def split_wqkv(fused: Tensor, config: InternLM2Config) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values out of the fused matrix or its bias, each with its heads in order."""
    grouped = fused.view(config.num_key_value_heads, config.group + 2, config.head_dim, *fused.shape[1:])
    queries, keys, values = grouped[:, : config.group], grouped[:, -2], grouped[:, -1]
    return queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)


def join_wqkv(split: Sequence[Tensor], config: InternLM2Config) -> Tensor:
    """Return the fused matrix or bias of queries, keys and values; `split_wqkv` the other way round."""
    G, h = config.num_key_value_heads, config.head_dim
    heads = [part.view(G, -1, h, *part.shape[1:]) for part in split]
    return torch.cat(heads, dim=1).flatten(0, 2)
