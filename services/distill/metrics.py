"""Metrics of a step, over all workers; see services/distill/runlog.py for their meaning."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fusion_core.blocks import Block
from fusion_core.losses import Losses
from services.distill.batch import Batch
from services.distill.world import World


class StepMeter:
    """Collects the sums of one step on one worker; `row` adds them up over the workers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._started = time.perf_counter()
        self._sums: list[float] = []
        self._weights: dict[str, float] = {}
        self._tokens_only = True

    def add(self, blocks: Sequence[Block], batch: Batch, losses: Losses) -> None:
        """The step's blocks and what the forward pass gave for them."""
        clm = float(losses.clm_N.sum(dtype=torch.float64))
        fusion = 0.0 if losses.fusion_N is None else float(losses.fusion_N.sum(dtype=torch.float64))
        covered = [(block.covered_mass, block.num_tokens) for block in blocks if math.isfinite(block.covered_mass)]
        self._sums = [
            clm,
            fusion,
            batch.num_tokens,
            batch.num_fused,
            len(blocks),
            sum(mass * tokens for mass, tokens in covered),
            sum(tokens for _, tokens in covered),
        ]
        self._tokens_only = batch.rows is None
        weights: dict[str, float] = defaultdict(float)
        for block in blocks:
            for share in block.shares:
                weights[share.name] += share.weight * block.num_tokens
        self._weights = dict(weights)

    def row(self, *, waited_seconds: float) -> dict[str, Any]:
        """Metrics of the global batch."""
        clm, fusion, tokens, fused, windows, covered, covered_tokens = self._world.sum(self._sums)
        weights: dict[str, float] = defaultdict(float)
        for part in self._world.gather(self._weights):
            for name, weight in part.items():
                weights[name] += weight
        seconds, waited_seconds = self._world.max([time.perf_counter() - self._started, waited_seconds])
        return {
            "tokens": int(tokens),
            "windows": int(windows),
            "clm": clm / tokens,
            "fusion": None if self._tokens_only else fusion / max(1.0, fused),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited_seconds,
            "masked_share": None if self._tokens_only else 1 - fused / tokens,
            "covered_mass": covered / covered_tokens if covered_tokens and not self._tokens_only else None,
            "source_weights": {name: weight / tokens for name, weight in sorted(weights.items())},
        }
