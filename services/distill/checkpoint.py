"""A checkpoint: a Hugging Face folder that anybody can load, and beside it what the trainer needs to go on exactly.

    config.json, *.safetensors, tokenizer files
    trainer_state.pt     optimiser state by parameter name, and `Position`
    checkpoint.json      step and the size of every file: a folder is complete when all are there

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

from services.common.cursor import Cursor
from services.distill.model import save_model

_STATE = "trainer_state.pt"
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Attributes:
        step: steps taken.
        windows: windows consumed by all workers since the start.
        tokens: tokens of these windows.
        world_size: number of workers that took the last step.
        cursor: position in the stream, the same for every rank; None before the first step.
        plan: identity of the run that the position belongs to.
    """

    step: int
    windows: int
    tokens: int
    world_size: int
    cursor: Cursor | None
    plan: str

    def cursor_for(self, world_size: int) -> Cursor | None:
        """The cursor that a run with another number of workers goes on from."""
        if self.cursor is None or self.world_size == world_size:
            return self.cursor
        return self.cursor.redeal(self.world_size)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Full optimiser state by parameter name, on CPU; collective where the module is sharded."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(module, optimizer, options=options))


def save_checkpoint(
    folder: Path, model: Any, tokenizer_folder: Path, optimizer: dict[str, Any], position: Position
) -> None:
    """Writes a complete checkpoint into an empty folder; on rank 0 only."""
    save_model(model, tokenizer_folder, folder)
    torch.save({"optimizer": optimizer, "position": asdict(position)}, folder / _STATE)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps({"step": position.step, "files": sizes}))


def load_state(folder: Path) -> tuple[dict[str, Any], Position]:
    """Optimiser state and position of a checkpoint."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    fields = state["position"]
    cursor = fields["cursor"] and Cursor.from_json(fields["cursor"])
    return state["optimizer"], Position(**{**fields, "cursor": cursor})


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` gave, whatever the parallelism is now."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step below `folder`, or None."""
    found: list[tuple[int, Path]] = []
    for manifest in folder.glob(f"*/{_MANIFEST}"):
        try:
            record = json.loads(manifest.read_text())
            sizes = {name: (manifest.parent / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError):
            continue
        if sizes == record["files"]:
            found.append((record["step"], manifest.parent))
    return max(found, default=(0, None))[1]
