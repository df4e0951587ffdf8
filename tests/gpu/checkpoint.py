"""Optimiser state saved and read back between DDP and FSDP2 on the device; training goes on as if nothing had been."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from services.distill.checkpoint import POSITION, restore_optimizer, save_optimizer
from services.distill.workers.parallel import parallelise, whole_state
from tests.bench.parts.report import Report
from tests.gpu.small_target import adamw, batches, dense_model, module_of, one_worker, train


def check(report: Report, device: torch.device, *, quick: bool) -> None:
    given = batches(8, device)
    with one_worker(device):
        for before, after in (("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
            bare = module_of(dense_model(device), device)
            module = parallelise(bare, before, device)  # type: ignore[arg-type]
            optimizer = adamw(module)
            train(module, optimizer, given[:4])
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save_optimizer(module, optimizer, folder / "optimizer")
                (folder / POSITION).write_text(json.dumps({"optimizer": "optimizer"}))
                weights = {name: weight.clone() for name, weight in whole_state(bare).items()}
                expected = train(module, optimizer, given[4:])
                model = dense_model(device, seed=1)
                model.load_state_dict(weights, strict=False)  # tied weights are there once
                resumed = parallelise(module_of(model, device), after, device)  # type: ignore[arg-type]
                optimizer = adamw(resumed)
                restore_optimizer(resumed, optimizer, folder)
                found = train(resumed, optimizer, given[4:])
            off = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
            report.check(
                f"{before} saved, {after} resumed: largest relative difference of a loss", off, "", at_most=1e-4
            )
