"""A checkpoint: a Hugging Face folder that anybody can load, and beside it what the trainer needs to go on exactly.

    config.json, *.safetensors, tokenizer files (with LoRA adapter_config.json and adapter_model.safetensors, for peft)
    trainer_state.pt     optimiser state by parameter name, and `Position`
    checkpoint.json      step, plan and the size of every file: a folder is complete when all are there

Learning rate and random numbers are functions of step, seed and rank, so that there is nothing of theirs to store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from services.jobs.storage import MANIFEST
from services.wire.cursor import Cursor

_STATE = "trainer_state.pt"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Attributes:
        step: steps taken.
        windows: windows consumed by all workers since the start.
        tokens: tokens of these windows.
        cursor: position in the stream, the same for every rank and for any number of ranks: windows are counted as
            dealt, none as received since. None before the first step.
        plan: identity of the run that the position belongs to.
    """

    step: int
    windows: int
    tokens: int
    cursor: Cursor | None
    plan: str


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Full optimiser state by parameter name, on CPU; collective where the module is sharded."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(module, optimizer, options=options))


def save_state(folder: Path, optimizer: dict[str, Any], position: Position) -> None:
    """Makes a complete checkpoint of a folder that holds the model; on rank 0 only."""
    torch.save({"optimizer": optimizer, "position": asdict(position)}, folder / _STATE)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    record = {"step": position.step, "plan": position.plan, "files": sizes}
    (folder / MANIFEST).write_text(json.dumps(record))


def load_state(folder: Path) -> tuple[dict[str, Any], Position]:
    """Optimiser state and position of a checkpoint."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    fields = state["position"]
    cursor = fields["cursor"] and Cursor.from_json(fields["cursor"])
    return state["optimizer"], Position(**{**fields, "cursor": cursor})


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` gave, whatever the parallelism is now."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
