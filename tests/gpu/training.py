"""Training on the device as it is, with DDP and with FSDP2 around it, and under bfloat16 autocast."""

from __future__ import annotations

import torch

from services.distill.workers.parallel import parallelise
from tests.bench.parts.report import Report
from tests.gpu.small_target import adamw, batches, dense_model, module_of, one_worker, train


def check(report: Report, device: torch.device, *, quick: bool) -> None:
    given = batches(6 if quick else 30, device)
    on_cpu = train(
        *_with_optimizer(module_of(dense_model(device), torch.device("cpu"))), batches(len(given), torch.device("cpu"))
    )
    plain = train(*_with_optimizer(module_of(dense_model(device), device)), given)
    found = {"alone": plain}
    with one_worker(device):
        for kind in ("ddp", "fsdp"):
            module = parallelise(module_of(dense_model(device), device), kind, device)  # type: ignore[arg-type]
            found[kind] = train(*_with_optimizer(module), given)
    for name, losses in found.items():
        off = max(abs(a - b) / b for a, b in zip(losses, on_cpu, strict=True))
        report.row(table="training", workers=name, steps=len(given), first_loss=losses[0], last_loss=losses[-1])
        report.check(f"{name}: largest relative difference of a loss from the CPU's", off, "", at_most=1e-3)
    halved = train(*_with_optimizer(module_of(dense_model(device), device, torch.bfloat16)), given)
    report.row(table="training", workers="bfloat16", steps=len(given), first_loss=halved[0], last_loss=halved[-1])
    report.check("bfloat16: last loss over float32's", halved[-1] / plain[-1], "", at_least=0.97, at_most=1.03)
    report.check("bfloat16: last loss over the first", halved[-1] / halved[0], "", at_most=0.98)


def _with_optimizer(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    return module, adamw(module)
