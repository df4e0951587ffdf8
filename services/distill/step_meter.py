"""The metrics of a step, over all workers; services/jobs/step_log.py explains each of them."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_core.blocks import Block
from services.distill.workers.world import World


@dataclass(frozen=True, slots=True)
class StepTotals:
    """The size of a step's global batch, all workers together.

    Attributes:
        tokens: tokens to predict.
        fused: rows among them that carry a fused distribution.
        windows: windows, those that came without distributions left out.
        most_windows: windows of the worker that holds most of them, the same number on all workers.
        answer_tokens: tokens among all that belong to the target's own answers.
    """

    tokens: float
    fused: float
    windows: float
    most_windows: int
    answer_tokens: float = 0.0


@dataclass(slots=True)
class StepLosses:
    """One worker's share of the losses of a step.

    Attributes:
        loss: the worker's part of the loss whose gradient is taken.
        clm, fusion: sums over its tokens, in nats; clm without those of the target's own answers.
        reverse_kl: sum over the tokens of the answers, the masked ones apart, of the target's log-probability minus the
            fused one: by what was sampled, an estimate of the reverse KL divergence.
        answer_rows: number of these tokens.
        input_tokens: tokens that the worker's passes read, contexts included and padding not.
        routing: figures of the target's experts over all workers (`StepRouting.figures`); None for a dense target.
        coefficients: values of the objective in this step that are the same on all workers, such as lambda.
    """

    loss: float = 0.0
    clm: float = 0.0
    fusion: float = 0.0
    reverse_kl: float = 0.0
    answer_rows: int = 0
    input_tokens: int = 0
    coefficients: dict[str, float] = field(default_factory=dict)
    routing: dict[str, Any] | None = None


@dataclass(slots=True)
class _Group:
    """Windows of a step that the same sources scored; the weights are summed over the windows' tokens."""

    names: tuple[str, ...]
    windows: int = 0
    tokens: int = 0
    weights: list[float] = field(default_factory=list)

    def add(self, windows: int, tokens: int, weights: Sequence[float]) -> None:
        self.windows, self.tokens = self.windows + windows, self.tokens + tokens
        before = self.weights or [0.0] * len(self.names)
        self.weights = [old + new for old, new in zip(before, weights, strict=True)]

    def row(self) -> dict[str, Any]:
        means = [weight / max(1, self.tokens) for weight in self.weights]
        sources = dict(zip(self.names, means, strict=True))
        return {"sources": sources, "windows": self.windows, "tokens": self.tokens}


class StepMeter:
    """The sums of one step on one worker; `row` adds them up over the workers."""

    def __init__(self, world: World, *, tokens_only: bool) -> None:
        """Start the step's time; waiting for its windows is part of it."""
        self._world = world
        self._started = time.perf_counter()
        self._tokens_only = tokens_only
        self._covered = (0.0, 0.0)
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._skipped = 0

    def take(
        self, windows: Sequence[Block], answers: Sequence[Block] = (), *, skipped: int, most_windows: int
    ) -> StepTotals:
        """Add the step's blocks on this worker, and the number of windows without one; return the global sums.

        `most_windows`: the largest share of a worker, windows without a block included.
        """
        blocks = [*windows, *answers]
        self._skipped = skipped
        covered = [(block.covered_mass, block.num_tokens) for block in blocks if math.isfinite(block.covered_mass)]
        self._covered = sum(mass * tokens for mass, tokens in covered), sum(tokens for _, tokens in covered)
        for block in blocks:
            present = sorted((share for share in block.shares if share.present), key=lambda share: share.name)
            if present:
                names = tuple(share.name for share in present)
                self._groups.setdefault(names, _Group(names)).add(
                    1, block.num_tokens, [share.weight * block.num_tokens for share in present]
                )
        tokens = sum(block.num_tokens for block in blocks)
        fused = 0 if self._tokens_only else sum(int(block.mask_T.sum()) for block in blocks)
        answer_tokens = sum(block.num_tokens for block in answers)
        sums = self._world.sum([tokens, fused, len(blocks), answer_tokens])
        num_tokens, num_fused, num_windows, num_answer_tokens = sums
        return StepTotals(num_tokens, num_fused, num_windows, most_windows, num_answer_tokens)

    def skipped_anywhere(self) -> bool:
        """Return whether a window of the step was left out; asked by all workers together."""
        return self._world.sum([float(self._skipped)])[0] > 0

    def row(self, losses: StepLosses, totals: StepTotals, *, waited_seconds: float) -> dict[str, Any]:
        """Return the metrics of the global batch."""
        sums = [losses.loss, losses.clm, losses.fusion, *self._covered, self._skipped, losses.input_tokens]
        loss, clm, fusion, covered, covered_tokens, skipped, input_tokens = self._world.sum(sums)
        groups: dict[tuple[str, ...], _Group] = {}
        for part in self._world.gather(self._groups):
            for names, group in part.items():
                groups.setdefault(names, _Group(names)).add(group.windows, group.tokens, group.weights)
        weights: dict[str, float] = defaultdict(float)
        for group in groups.values():
            for name, weight in zip(group.names, group.weights, strict=True):
                weights[name] += weight
        seconds, waited_seconds = self._world.max([time.perf_counter() - self._started, waited_seconds])
        tokens, fused = totals.tokens, totals.fused
        return {
            "tokens": int(tokens),
            "input_tokens": int(input_tokens),
            "windows": int(totals.windows),
            "skipped": int(skipped),
            "loss": loss,
            "clm": clm / (tokens - totals.answer_tokens) if tokens > totals.answer_tokens else None,
            "fusion": None if self._tokens_only else fusion / max(1.0, fused),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited_seconds,
            "masked_share": None if self._tokens_only else 1 - fused / tokens,
            "covered_mass": covered / covered_tokens if covered_tokens and not self._tokens_only else None,
            "source_weights": {name: weight / tokens for name, weight in sorted(weights.items())},
            "scored_by": [groups[names].row() for names in sorted(groups)],
            **({} if losses.routing is None else {"routing": losses.routing}),
        }
