"""The target as answers are sampled from it: the one that is trained, or a whole copy where its weights are sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from services.distill.target.module import DistillModule
from services.distill.workers.parallel import whole_state
from services.distill.workers.world import World


class WholeTarget:
    """The whole target on every worker, or with FSDP on rank 0 alone, which then answers all prompts.

    Attributes:
        model: the causal language model to sample from; on a worker that does not answer, one without whole weights.
        num_answering: workers that answer prompts, those of the lowest ranks.
    """

    def __init__(self, module: DistillModule, world: World, *, adapters: bool, make_copy: Callable[[], Any]) -> None:
        """Take the bare module; `make_copy` loads a target of the same shape, `adapters` says that only these learn."""
        self._module, self._world, self._adapters = module, world, adapters
        self._sharded = isinstance(module, FSDPModule)
        self.num_answering = 1 if self._sharded else world.size
        self.model = module.model
        if self._sharded and world.rank == 0:
            self.model = make_copy().to(world.device)

    def renew(self, identity: str) -> str:
        """Take on the weights as they are now; return a hash of them and of the run's identity. Collective."""
        if self._sharded:
            state = whole_state(self._module, trained_only=self._adapters)
            if self._world.rank == 0:
                # Frozen weights are not in it, and of tied ones a single name.
                unknown = self.model.load_state_dict(state, strict=False).unexpected_keys
                assert not unknown, unknown
        hashed = _weights_hash(self.model, identity) if self._world.rank == 0 else ""
        return str(self._world.gather(hashed)[0])


def _weights_hash(model: Any, identity: str) -> str:
    """Return the hash of all weights that are trained, and of the run that they belong to."""
    digest = hashlib.sha256(identity.encode())
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
