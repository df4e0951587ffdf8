"""Metrics of a step, over all workers; see services/jobs/step_log.py for their meaning."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fusion_core.blocks import Block
from fusion_core.losses import Losses
from services.distill.workers.world import World


class StepMeter:
    """Collects the sums of one step on one worker, pass by pass; `row` adds them up over the workers."""

    def __init__(self, world: World, *, tokens_only: bool) -> None:
        """The step's time starts now; waiting for its windows is part of it."""
        self._world = world
        self._started = time.perf_counter()
        self._tokens_only = tokens_only
        self._loss = self._clm = self._fusion = 0.0
        self._counts: list[float] = []
        self._weights: dict[str, float] = {}
        self._skipped = 0

    def take(self, blocks: Sequence[Block], *, skipped: int) -> None:
        """The step's blocks on this worker, and how many windows came without."""
        self._skipped = skipped
        covered = [(block.covered_mass, block.num_tokens) for block in blocks if math.isfinite(block.covered_mass)]
        self._counts = [
            sum(block.num_tokens for block in blocks),
            0 if self._tokens_only else sum(int(block.mask_T.sum()) for block in blocks),
            len(blocks),
            sum(mass * tokens for mass, tokens in covered),
            sum(tokens for _, tokens in covered),
        ]
        weights: dict[str, float] = defaultdict(float)
        for block in blocks:
            for share in block.shares:
                weights[share.name] += share.weight * block.num_tokens
        self._weights = dict(weights)

    def add(self, losses: Losses, *, scale: float) -> None:
        """What a forward pass gave; `scale` is the factor that its weights carry beyond the loss' own."""
        self._loss += float(losses.total.detach()) / scale
        self._clm += float(losses.clm_N.sum(dtype=torch.float64))
        if losses.fusion_N is not None:
            self._fusion += float(losses.fusion_N.sum(dtype=torch.float64))

    def skipped_anywhere(self) -> bool:
        """Whether a window of the step was left out; asked by all workers together."""
        return self._world.sum([float(self._skipped)])[0] > 0

    def row(self, *, waited_seconds: float) -> dict[str, Any]:
        """Metrics of the global batch."""
        sums = [self._loss, self._clm, self._fusion, *self._counts, self._skipped]
        loss, clm, fusion, tokens, fused, windows, covered, covered_tokens, skipped = self._world.sum(sums)
        weights: dict[str, float] = defaultdict(float)
        for part in self._world.gather(self._weights):
            for name, weight in part.items():
                weights[name] += weight
        seconds, waited_seconds = self._world.max([time.perf_counter() - self._started, waited_seconds])
        return {
            "tokens": int(tokens),
            "windows": int(windows),
            "skipped": int(skipped),
            "loss": loss,
            "clm": clm / tokens,
            "fusion": None if self._tokens_only else fusion / max(1.0, fused),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited_seconds,
            "masked_share": None if self._tokens_only else 1 - fused / tokens,
            "covered_mass": covered / covered_tokens if covered_tokens and not self._tokens_only else None,
            "source_weights": {name: weight / tokens for name, weight in sorted(weights.items())},
        }
