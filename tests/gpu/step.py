"""Time and memory of a whole training step, fused and with CLM only, at two sizes of the vocabulary."""

from __future__ import annotations

import time
from statistics import median

import torch

from tests.bench.loss import VOCABULARIES, Case
from tests.bench.parts.report import Report

_SIDES = ("fused", "clm", "clm_full")


def check(report: Report, device: torch.device, *, quick: bool) -> None:
    on_gpu = device.type == "cuda"
    for vocabulary_size in VOCABULARIES[:1] if quick else VOCABULARIES:
        case = Case(vocabulary_size, windows=16 if on_gpu else 1, hidden_size=1024 if on_gpu else 64, device=device)
        seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
        mib = dict.fromkeys(_SIDES, 0.0)
        for repetition in range(3 if quick else 8):
            for side in _SIDES:
                if on_gpu:
                    torch.cuda.synchronize(device)
                    torch.cuda.reset_peak_memory_stats(device)
                resting, started = torch.cuda.memory_allocated(device) if on_gpu else 0, time.perf_counter()
                case.step(side)
                if on_gpu:
                    torch.cuda.synchronize(device)
                    mib[side] = (torch.cuda.max_memory_allocated(device) - resting) / 2**20
                if repetition:  # the first one compiles, and makes the optimiser's state
                    seconds[side].append(time.perf_counter() - started)
        fastest = min(median(seconds[side]) for side in ("clm", "clm_full"))
        for side in _SIDES:
            report.row(
                table="step", vocabulary=vocabulary_size, side=side, tokens=case.num_tokens,
                seconds=median(seconds[side]), step_mib=mib[side] or None,
            )  # fmt: skip
        of = f"V = {vocabulary_size:,}"
        report.check(
            f"time of a step, fused / best CLM only, {of}", median(seconds["fused"]) / fastest, "", at_most=1.15
        )
        if on_gpu:
            least = min(mib["clm"], mib["clm_full"])
            report.check(f"memory of a step, fused / best CLM only, {of}", mib["fused"] / least, "", at_most=1.15)
