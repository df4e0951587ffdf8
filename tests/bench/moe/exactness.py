"""The function of a mixture beside the dense model's, before training: differences of logits, and noise on routers."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.bench.moe.models import ROUTERS, dense_model, logits, mixture, nats_per_token
from tests.bench.parts.report import Report
from tests.fusion_core.moe.dense_models import DENSE
from tests.fusion_core.moe.dense_models import dense_model as tiny_model
from tests.fusion_core.moe.dense_models import ids as tiny_ids

NOISE = (0.0, 0.001, 0.01, 0.1, 1.0)
INITS = ("residual", "split")
BOUNDS = ((torch.float64, 1e-10), (torch.float32, 1e-3))


def measure_shapes(report: Report) -> None:
    """Compare tiny models of the shapes that can become a mixture. Two experts are active: routers compute in float32,
    where their weight 1/2 is exact."""
    for dtype, bound in BOUNDS:
        largest = 0.0
        for shape in DENSE:
            dense = tiny_model(shape, dtype=dtype)
            expected = logits(dense, tiny_ids())
            for init in INITS:
                made = mixture(dense, init, shards=6, shared=4, copies=2)
                made.set_experts_implementation("eager")  # grouped products have no float64
                difference = float((logits(made, tiny_ids()) - expected).abs().max())
                largest = max(largest, difference)
                report.row(
                    table="exactness",
                    model=shape,
                    dtype=_name(dtype),
                    init=init,
                    largest_difference=difference,
                    largest_logit=float(expected.abs().max()),
                )
        report.check(f"largest difference of a logit, {len(DENSE)} shapes, {_name(dtype)}", largest, "", at_most=bound)


def measure_smollm2(report: Report, ids_BL: Tensor) -> None:
    for dtype, bound in BOUNDS:
        dense = dense_model(dtype)
        expected = logits(dense, ids_BL)
        for init in INITS:
            made = mixture(dense, init, **({"shared": 6} if dtype is torch.float64 else {}))
            made.set_experts_implementation("eager")
            largest = float((logits(made, ids_BL) - expected).abs().max())
            report.row(
                table="exactness",
                model="SmolLM2",
                dtype=_name(dtype),
                init=init,
                largest_difference=largest,
                largest_logit=float(expected.abs().max()),
            )
            report.check(f"largest difference of a logit, SmolLM2, {init}, {_name(dtype)}", largest, "", at_most=bound)


def measure_bfloat16(report: Report, ids_BL: Tensor) -> None:
    """Compare likeliest tokens: of dense bfloat16 with dense float32, and of mixtures with dense bfloat16."""
    best = logits(dense_model(), ids_BL).argmax(-1)
    low = dense_model(torch.bfloat16)
    dense_best = logits(low, ids_BL).argmax(-1)
    agreement = float((dense_best == best).double().mean())
    report.row(table="bfloat16", model="dense", against="dense float32", same_argmax=agreement)
    for init in INITS:
        same = float((logits(mixture(low, init), ids_BL).argmax(-1) == dense_best).double().mean())
        report.row(table="bfloat16", model=init, against="dense bfloat16", same_argmax=same)
        report.check(f"same argmax as dense bfloat16, SmolLM2, {init}", same, "", at_least=agreement)


def measure_noise(report: Report, ids_BL: Tensor) -> None:
    """Add noise of growing standard deviation to every row of every router."""
    dense = dense_model()
    plain = nats_per_token(dense, ids_BL)
    report.row(table="router noise, nats per token", mixture="dense", **{"0": plain})
    for name, router_std in ROUTERS.items():
        made = mixture(dense, name)
        rows = [layer.mlp.gate.weight.detach().clone() for layer in made.model.layers]
        scores = {}
        for std in NOISE:
            generator = torch.Generator().manual_seed(1)
            for layer, row in zip(made.model.layers, rows, strict=True):
                layer.mlp.gate.weight.data = row + std * torch.randn(row.shape, generator=generator)
            scores[f"{std:g}"] = nats_per_token(made, ids_BL)
        report.row(table="router noise, nats per token", mixture=f"{name} (rows of std {router_std:g})", **scores)
        if name == "residual":
            worst = max(abs(score - plain) for score in scores.values())
            report.check("residual: change by any noise", worst, "nats/token", at_most=1e-3)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
