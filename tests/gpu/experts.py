"""A dense model as a mixture of experts on the device: the same logits, and a few steps of training."""

from __future__ import annotations

import torch

from fusion_core.moe.upcycle import Upcycling
from services.distill.target.moe import upcycle
from tests.bench.parts.report import Report
from tests.gpu.small_target import VOCABULARY, adamw, batches, dense_model, module_of, train


@torch.no_grad()
def _logits(model: torch.nn.Module, ids_BL: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    logits: torch.Tensor = model.eval().to(device, dtype)(input_ids=ids_BL.to(device)).logits
    return logits.float().cpu()


def check(report: Report, device: torch.device, *, quick: bool) -> None:
    ids_BL = torch.randint(VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(0))
    for init in ("residual", "split"):
        upcycling = Upcycling(init=init)  # type: ignore[arg-type]
        dense = _logits(dense_model(device), ids_BL, device, torch.float32)
        mixture = _logits(upcycle(dense_model(device), upcycling, seed=0), ids_BL, device, torch.float32)
        off = float((mixture - dense).abs().max())
        report.check(f"{init}: largest difference of a logit from the dense model", off, "", at_most=1e-3)
        halved = _logits(upcycle(dense_model(device), upcycling, seed=0), ids_BL, device, torch.bfloat16)
        dense_halved = _logits(dense_model(device), ids_BL, device, torch.bfloat16)
        agreement, own = (float((x.argmax(-1) == dense.argmax(-1)).float().mean()) for x in (halved, dense_halved))
        report.row(table="experts", init=init, argmax_in_bfloat16=agreement, argmax_of_dense_in_bfloat16=own)
        module = module_of(upcycle(dense_model(device), upcycling, seed=0), device)
        losses = train(module, adamw(module), batches(4 if quick else 20, device))
        report.row(table="experts", init=init, first_loss=losses[0], last_loss=losses[-1])
        report.check(f"{init}: last loss over the first", losses[-1] / losses[0], "", at_most=0.999)
