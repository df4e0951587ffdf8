"""A small target on the device, and batches of random fused rows for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from services.distill.data.batch import Batch, collate, pack
from services.distill.target.module import DistillModule
from tests.fakes.blocks import scored_block

VOCABULARY = 2048


def dense_model(device: torch.device, seed: int = 0) -> Any:
    """A Llama for the device, on the CPU: of 14 million parameters for a GPU, of a quarter of a million for a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size, layers = (512, 4) if device.type == "cuda" else (64, 2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
        )
    )  # fmt: skip


def module_of(model: Any, device: torch.device, autocast: torch.dtype | None = None) -> DistillModule:
    return DistillModule(model.to(device), vocabulary_size=VOCABULARY, autocast=autocast)


def batches(num_batches: int, device: torch.device) -> list[Batch]:
    """Eight packed windows each, the same few again and again, so that they can be learned."""
    made = []
    for number in range(num_batches):
        blocks = [
            scored_block(60, 8, seed=10 * (number % 2) + window, vocabulary_size=VOCABULARY) for window in range(8)
        ]
        made.append(collate(pack(blocks, 256), bos=1, vocabulary_size=VOCABULARY).to(device))
    return made


def train(module: nn.Module, optimizer: torch.optim.Optimizer, given: list[Batch]) -> list[float]:
    """Take a step on every batch; return the losses."""
    losses = []
    for batch in given:
        weights_N = torch.full((batch.num_tokens,), 0.5 / batch.num_tokens, device=batch.token_ids_N.device)
        total = module(batch, weights_N, weights_N).total
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total.detach()))
    return losses


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


@contextmanager
def one_worker(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, with the device's own transport."""
    with TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
