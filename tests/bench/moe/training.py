"""Steps of training: copies that stay whole, and time and memory beside dense models."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core.moe.routing import RouterRecorder
from services.distill.target.moe import tie_copies
from tests.bench.moe.models import ROUTERS, mixture, nats_per_token
from tests.bench.parts.report import Report, in_turn

SHAPE = {
    "vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
"""Layers of the widths of SmolLM2-135M."""
SIDES = ("dense", "split", "residual", "dense, equal total")
_LIMIT = 1.6


def ids_of(num_windows: int, length: int) -> Tensor:
    """Return token ids to train on, [B, L]."""
    return torch.randint(3, 8192, (num_windows, length), generator=torch.Generator().manual_seed(1))


def cut(side: str) -> Any:
    """Return a small model as one of the sides, ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if side in ROUTERS:
        made = mixture(cut("dense"), side).train()
        tie_copies(made)
        return made
    width = SHAPE["intermediate_size"]
    changes = {} if side == "dense" else {"intermediate_size": width // 8 * (24 + 2)}
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).train()


class Training:
    """Steps of a side on one batch."""

    def __init__(self, model: Any, ids_BL: Tensor) -> None:
        torch.set_num_threads(1)  # threads that wait for one another count as CPU time
        self.model, self.ids_BL = model, ids_BL
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(self) -> None:
        self.model(self.ids_BL, labels=self.ids_BL).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def whole_copies(model: Any, ids_BL: Tensor) -> float:
    """Return the share of tokens, over all layers, whose active experts are one whole copy."""
    recorder = RouterRecorder(model)
    with recorder.recording() as outputs, torch.no_grad():
        model(ids_BL)
    shares = []
    for _, indices_NK in outputs:
        copies_NK = indices_NK // recorder.num_active
        shares.append((copies_NK == copies_NK[:, :1]).all(-1).double().mean())
    return float(torch.stack(shares).mean())


def measure_copies(report: Report, ids_BL: Tensor, steps: int) -> None:
    """Train a split mixture with the rows of a copy tied, as a run does, and with free rows."""
    for tied in (True, False):
        model = cut("split") if tied else mixture(cut("dense"), "split")
        training = Training(model, ids_BL)
        for _ in range(steps):
            training.step()
        share = whole_copies(model, ids_BL)
        report.row(
            table="split after training",
            rows="tied" if tied else "free",
            steps=steps,
            whole_copies=share,
            nats_per_token=nats_per_token(model, ids_BL),
        )
        if tied:
            report.check(f"tokens sent to one whole copy after {steps} steps, tied rows", share, "", at_least=1.0)


def grown_mib(side: str, ids_BL: Tensor) -> float:
    """Return the growth of this process at its peak, over the model and two steps."""
    before = _peak_kib()
    training = Training(cut(side), ids_BL)
    for _ in range(2):
        training.step()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Return the most memory that this process has held; the maximum of `getrusage` would include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def active_parameters(model: Any) -> int:
    """Return the number of weights that one token meets: all but the routed experts that it is not sent to."""
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not routed:
        return int(model.num_parameters())
    return int(model.num_parameters() - routed * (1 - model.config.num_experts_per_tok / model.config.num_experts))


def measure_cost(report: Report, ids_BL: Tensor, repetitions: int) -> None:
    """Compare a step of every side, in turn; memory is that of a process of its own."""
    trainings = [Training(cut(side), ids_BL) for side in SIDES]
    for training in trainings:
        training.step()
    seconds = in_turn(repetitions, *(training.step for training in trainings))
    sizes = [(training.model.num_parameters(), active_parameters(training.model)) for training in trainings]
    _profile(report, trainings[0], "dense")
    _profile(report, trainings[1], "split")
    del trainings
    mib = {}
    for side, second, (total, active) in zip(SIDES, seconds, sizes, strict=True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            mib[side] = pool.submit(grown_mib, side, ids_BL).result()
        report.row(
            table="training step",
            model=side,
            parameters=total,
            active=active,
            cpu_seconds=second,
            to_dense=second / seconds[0],
            process_mib=mib[side],
            mib_to_dense=mib[side] / mib["dense"],
            mib_of_weights=16 * total / 2**20,
        )
    report.check("step of split to dense of equal active parameters", seconds[1] / seconds[0], "", at_most=_LIMIT)
    report.check("memory of split to dense of equal active parameters", mib["split"] / mib["dense"], "", at_most=_LIMIT)
    report.check(
        "memory of split to dense of equal total parameters", mib["split"] / mib[SIDES[-1]], "", at_most=_LIMIT
    )


def _profile(report: Report, training: Training, side: str) -> None:
    """Add the operations that take most of a step's CPU time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        training.step()
    found = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    for event in found[:6]:
        report.row(
            table="profile of a step",
            model=side,
            operation=event.key,
            calls=event.count,
            milliseconds=event.self_cpu_time_total / 1000,
            share=event.self_cpu_time_total / total,
        )
