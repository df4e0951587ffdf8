"""A checkpoint: a Hugging Face folder that anybody can load, with the trainer's state beside it for an exact resume.

    config.json, *.safetensors, tokenizer files (with LoRA adapter_config.json and adapter_model.safetensors, for peft)
    trainer_state.pt     optimiser state by parameter name, and `Position`
    checkpoint.json      step, identity ("plan") and the size of every file: a folder is complete when all are there

Learning rate and random numbers are functions of step, seed and rank, so they are not stored.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from services.distill.accounting import Position
from services.distill.target.module import DistillModule
from services.distill.target.trained import TrainedTarget
from services.distill.workers.parallel import whole_state
from services.jobs.storage import MANIFEST
from services.wire.cursor import Cursor

KeepCheckpoint = Callable[[dict[str, Any], Path | None, int], None]
"""A function of metrics, the checkpoint's folder (rank 0 only) and the step; all ranks call it at the same steps."""

_STATE = "trainer_state.pt"
_REPORTED = ("step", "epoch", "loss", "total_tokens")


class Checkpoints:
    """The maker of a run's checkpoints; all workers take part, rank 0 writes."""

    def __init__(
        self,
        target: TrainedTarget,
        module: DistillModule,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rank: int,
        keep: KeepCheckpoint,
    ) -> None:
        """Take the bare module and the one that the workers run together; `keep` stores a finished folder."""
        self._target, self._module, self._parallel, self._optimizer = target, module, parallel, optimizer
        self._rank, self._keep = rank, keep

    def save(self, row: Mapping[str, Any], position: Position) -> None:
        """Make a checkpoint of a step with these metrics."""
        optimizer = optimizer_state(self._parallel, self._optimizer)
        weights = self.weights()
        reported = {key: row[key] for key in _REPORTED}
        if self._rank != 0:
            self._keep(reported, None, position.step)
            return
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as folder:
            self._target.save(Path(folder), weights)
            save_state(Path(folder), optimizer, position)
            self._keep(reported, Path(folder), position.step)

    def weights(self) -> dict[str, Any] | None:
        """Return the weights to save, gathered where workers hold shards of them; None where the model has them all."""
        trained_only = self._target.has_adapters
        if not trained_only and not isinstance(self._module, FSDPModule):
            return None
        return whole_state(self._module, trained_only=trained_only)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the full optimiser state by parameter name, on the CPU; collective where the module is sharded."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(module, optimizer, options=options))


def save_state(folder: Path, optimizer: dict[str, Any], position: Position) -> None:
    """Make a complete checkpoint of a folder that holds the model; on rank 0 only."""
    fields = asdict(position)
    fields["plan"] = fields.pop("identity")
    torch.save({"optimizer": optimizer, "position": fields}, folder / _STATE)
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    record = {"step": position.step, "plan": position.identity, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(record))


def load_state(folder: Path) -> tuple[dict[str, Any], Position]:
    """Return optimiser state and position of a checkpoint."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    fields = dict(state["position"])
    cursor = fields.pop("cursor") and Cursor.from_json(state["position"]["cursor"])
    return state["optimizer"], Position(cursor=cursor, identity=fields.pop("plan"), **fields)


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state that `optimizer_state` returned, under the same parallelism or another."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
