"""The model over the workers of a run: DDP (each holds all of it) or FSDP2 (each holds a shard)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from services.distill.target.module import DistillModule

Parallel = Literal["ddp", "fsdp"]


def parallelise(module: DistillModule, kind: Parallel, device: torch.device) -> nn.Module:
    """Return the module as the workers of the default process group run it; both kinds average gradients over them.

    For FSDP only rank 0 needs the weights: elsewhere the module may be without memory (on device `meta`), and no worker
    but rank 0 ever holds more than its shards and one layer.
    """
    if kind == "ddp":
        return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    # A group of its own for every layer, so that one layer's weights are gathered at a time. Embeddings, last norm and
    # lm_head stay together with the root, whose forward pass is the only one that reads the lm_head.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = set(getattr(module.model, "_no_split_modules", None) or ())
    whole = module.state_dict() if dist.get_rank() == 0 else {}
    for part in [part for part in module.modules() if type(part).__name__ in layers]:
        _allocate(part, device)
        fully_shard(part, mesh=mesh)
    _allocate(module, device)
    fully_shard(module, mesh=mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, whole, options=options)
    for buffer in module.buffers():  # such as the frequencies of positions, which are not saved with the weights
        dist.broadcast(buffer, src=0)
    return module


def _allocate(part: nn.Module, device: torch.device) -> None:
    """Give memory to the parameters and buffers of `part` that have none yet; tied ones stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in part.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                if weight not in made:
                    made[weight] = nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
                module._parameters[name] = made[weight]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)


@contextmanager
def gradients_kept_back(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Keep the gradients of this forward and backward pass on their worker, to be added to those of a later pass."""
    if not enabled:
        yield
    elif isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def whole_state(module: DistillModule, *, trained_only: bool = False) -> dict[str, Any]:
    """Return weights of the model by their names in it, on the CPU.

    The call is collective where the module is sharded, and then only rank 0 gets the weights.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state = get_model_state_dict(module, options=options)
    return {name.removeprefix("model."): value for name, value in state.items()}
