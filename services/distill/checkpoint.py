"""A checkpoint: a Hugging Face folder that anybody can load, with the trainer's state beside it for an exact resume.

    config.json, *.safetensors, tokenizer files (with LoRA adapter_config.json and adapter_model.safetensors, for peft)
    optimizer-XXXX/      optimiser state by parameter name, a shard per worker, by torch.distributed.checkpoint
    trainer_state.json   `Position`, and the name of the optimiser's folder
    checkpoint.json      step, identity ("plan") and the size of every file: a folder is complete when all are there

Workers of another number, or in another kind of parallelism, read the slices that they need. Learning rate and random
numbers are functions of step, seed and rank, so they are not stored.
"""

from __future__ import annotations

import json
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule

from services.distill.accounting import Position
from services.distill.target.module import DistillModule
from services.distill.target.trained import TrainedTarget
from services.distill.workers.parallel import whole_state
from services.distill.workers.world import World
from services.jobs.storage import MANIFEST
from services.wire.cursor import Cursor

KeepCheckpoint = Callable[[dict[str, Any], Path, int], None]
"""A function of metrics, the folder with this worker's part of a checkpoint, and the step; all ranks call it at the
same steps. The parts together are the checkpoint."""

POSITION = "trainer_state.json"
_WHOLE_STATE = "trainer_state.pt"
"""Name of the file with optimiser state and position in checkpoints of earlier versions, which are still read."""
_REPORTED = ("step", "epoch", "loss", "total_tokens")
_FILE_BYTES = 1 << 30
"""Bytes of optimiser state of all workers for which each one writes one file; a file is built in memory."""


class Checkpoints:
    """The maker of a run's checkpoints; every worker writes its part."""

    def __init__(
        self,
        target: TrainedTarget,
        module: DistillModule,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        keep: KeepCheckpoint,
    ) -> None:
        """Take the bare module and the one that the workers run together; `keep` stores a finished part."""
        self._target, self._module, self._parallel, self._optimizer = target, module, parallel, optimizer
        self._world, self._keep = world, keep

    def save(self, row: Mapping[str, Any], position: Position) -> None:
        """Make a checkpoint of a step with these metrics."""
        # A name of its own: shards that a killed attempt left in the same folder are never read with these.
        optimizer_folder = self._world.gather(f"optimizer-{uuid.uuid4().hex[:8]}")[0]
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as name:
            folder = Path(name)
            save_optimizer(self._parallel, self._optimizer, folder / optimizer_folder)
            weights = self.weights()
            if self._world.rank == 0:
                self._target.save(folder, weights)
                state = {"position": asdict(position), "optimizer": optimizer_folder}
                (folder / POSITION).write_text(json.dumps(state))
            files = [file for file in folder.rglob("*") if file.is_file()]
            parts = self._world.gather({file.relative_to(folder).as_posix(): file.stat().st_size for file in files})
            if self._world.rank == 0:
                sizes = {path: size for part in parts for path, size in part.items()}
                record = {"step": position.step, "plan": position.identity, "files": sizes}
                (folder / MANIFEST).write_text(json.dumps(record))
            self._keep({key: row[key] for key in _REPORTED}, folder, position.step)

    def weights(self) -> dict[str, Any] | None:
        """Return the weights to save, gathered where workers hold shards of them; None where the model has them all."""
        trained_only = self._target.has_adapters
        if not trained_only and not isinstance(self._module, FSDPModule):
            return None
        return whole_state(self._module, trained_only=trained_only)


def load_position(folder: Path) -> Position:
    """Return the position of a checkpoint."""
    if (folder / POSITION).exists():
        fields = json.loads((folder / POSITION).read_text())["position"]
    else:
        fields = dict(_whole_state(folder)["position"])
        fields["identity"] = fields.pop("plan")
    cursor = fields.pop("cursor")
    return Position(cursor=cursor and Cursor.from_json(cursor), **fields)


def save_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write this worker's part of the optimiser state into `folder`, which is made; collective.

    A worker writes its own shard of sharded state; state that all workers hold is divided among them. Raises
    OSError on all workers when one of them cannot write.
    """
    tensors = _optimizer_tensors(module, optimizer)[1]
    number, room, numbers = 1, _FILE_BYTES, {}
    for key in sorted(tensors):
        size = tensors[key].numel() * tensors[key].element_size()
        if size > room and room < _FILE_BYTES:
            number, room = number + 1, _FILE_BYTES
        numbers[key], room = number, room - size
    folder.mkdir()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    with _named_errors(f"cannot write to {folder}"):
        save(tensors, storage_writer=writer)


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the optimiser state of the checkpoint in `folder`, under the same parallelism or another; collective.

    A worker reads only its own part, straight into its own tensors. Raises OSError on all workers when one of them
    cannot read.
    """
    if not (folder / POSITION).exists():
        state = _whole_state(folder)["optimizer"]
        set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
        return
    everything, tensors = _optimizer_tensors(module, optimizer)
    stored = folder / json.loads((folder / POSITION).read_text())["optimizer"]
    with _named_errors(f"cannot read {folder.name}/{stored.name}"):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(stored)))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(module, optimizer, everything | tensors, options=options)


def _whole_state(folder: Path) -> dict[str, Any]:
    """Return optimiser state and position of an earlier version's checkpoint; tensors are read on first use."""
    state: dict[str, Any] = torch.load(folder / _WHOLE_STATE, map_location="cpu", weights_only=True, mmap=True)
    return state


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the optimiser state by parameter name, and its tensors; the other values follow from the configuration."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    everything: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer, options=options))
    return everything, {key: value for key, value in everything.items() if isinstance(value, Tensor)}


@contextmanager
def _named_errors(problem: str) -> Iterator[None]:
    """Let torch.distributed.checkpoint run without a process group too, and raise its errors as OSError.

    The library's own error is no Exception, and its message holds the stack of every worker.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise OSError(f"optimiser state: {problem} (worker {rank}): {cause}") from cause
