"""The rounds of a run on one worker: their ledgers, and which answers a step takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_core.blocks import Block
from services.base.errors import FailedPreconditionError
from services.distill.on_policy.config import OnPolicyConfig
from services.distill.on_policy.feed import AnswerFeed
from services.distill.on_policy.ledger import RoundLedger
from services.distill.on_policy.whole_target import WholeTarget
from services.distill.on_policy.writer import AnswerWriter
from services.distill.step_meter import StepLosses, StepTotals
from services.distill.workers.world import World

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OwnShare:
    """A worker's part of the answers of a step.

    Attributes:
        blocks: those that could be fused.
        places, left_out: places in the round's ledger of these, and of those that could not.
    """

    blocks: list[Block] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places) + len(self.left_out)


class Rounds:
    """The answers that the steps of a run take, a worker its part; `begin` opens a round before its first step."""

    def __init__(
        self,
        folder: Path,
        config: OnPolicyConfig,
        target: WholeTarget,
        writer: AnswerWriter,
        feed: AnswerFeed,
        world: World,
    ) -> None:
        self._folder, self._config, self._target, self._writer = folder, config, target, writer
        self._feed, self._world = feed, world
        self._ledger: RoundLedger | None = None
        self._number = 0

    def begin(self, number: int, step: int, *, identity: str, begun: str | None) -> str:
        """Open the round that `step` belongs to, and return its name; all workers call it together.

        A round that has begun is the one that the checkpoint names. Another is written, unless these weights have
        written it before: then it is the same.

        Args:
            number: of the round, from 0.
            step: the next one, counted from 0 over the run.
            identity: of the run.
            begun: name of the round of the last step; None before the first one.

        Raises FailedPreconditionError when the round's folder is gone or damaged, or too few answers have text.
        """
        first = step - number * self._config.round_steps
        if first and begun is not None:
            ledger = RoundLedger.open(self._folder / begun)
            if ledger is None:
                raise FailedPreconditionError(f"round: {self._folder / begun} is gone; start the run over")
        else:
            ledger = self._written(number, identity)
        self._ledger, self._number = ledger, number
        # What is left of the round, in the order of its steps.
        left = [self._places(within)[self._world.rank :: self._world.size] for within in range(first, self._steps)]
        self._feed.put([ledger.answers[place].passage for places in left for place in places])
        return ledger.name

    def shares(self, step: int) -> list[int]:
        """Return by rank the number of answers that a worker takes in a step."""
        count, size = len(self._places(step % self._steps)), self._world.size
        return [len(range(rank, count, size)) for rank in range(size)]

    def take(self, step: int) -> OwnShare:
        """Return this worker's answers of a step, fused; raises what the fusion service answered to one of them."""
        places = self._places(step % self._steps)[self._world.rank :: self._world.size]
        share = OwnShare()
        for place, block in zip(places, self._feed.take(len(places)), strict=True):
            if block is None:
                share.left_out.append(place)
            else:
                share.places.append(place)
                share.blocks.append(block)
        return share

    def figures(self, step: int, share: OwnShare, losses: StepLosses, totals: StepTotals) -> dict[str, Any]:
        """Return the figures of a step's answers, all workers together; services/jobs/step_log.py explains them."""
        tokens = sum(block.num_tokens for block in share.blocks)
        ended = sum(block.ends_document for block in share.blocks)
        sums = [len(share.blocks), len(share.left_out), tokens, ended, losses.reverse_kl, losses.answer_rows]
        windows, skipped, num_tokens, num_ended, reverse_kl, rows = self._world.sum(sums)
        return {
            "round": self._number,
            "staleness": step % self._steps,
            "windows": int(windows),
            "skipped": int(skipped),
            "share": num_tokens / totals.tokens,
            "mean_length": num_tokens / windows if windows else None,
            "ended_share": num_ended / windows if windows else None,
            "reverse_kl": reverse_kl / rows if rows else None,
        }

    def place(self, share: OwnShare) -> dict[str, Any]:
        """Return the round's name, and the places of this step's answers in its ledger, of all workers together."""
        assert self._ledger is not None
        parts = self._world.gather((share.places, share.left_out))
        taken, left_out = (sorted(place for part in parts for place in part[kind]) for kind in (0, 1))
        return {"round": self._ledger.name, "answers": taken, "answers_skipped": left_out}

    @property
    def wait_seconds(self) -> float:
        """The time that steps have waited for fused answers, in total."""
        return self._feed.wait_seconds

    def close(self) -> None:
        """Ask for no more answers."""
        self._feed.close()

    @property
    def _steps(self) -> int:
        return self._config.round_steps

    def _written(self, number: int, identity: str) -> RoundLedger:
        weights = self._target.renew(identity)
        folder = self._folder / f"{number:05d}-{weights}"
        there = _sound(folder) if self._world.rank == 0 else None
        if self._world.gather(there is not None)[0]:
            return there or _opened(folder)
        started = time.perf_counter()
        answers, left_out = self._writer.write(number)
        if self._world.rank == 0:
            seconds = round(time.perf_counter() - started, 3)
            logger.info("round %d: %d answers in %.1f s, left out: %s", number, len(answers), seconds, left_out)
            details = {"round": number, "weights": weights, "left_out": left_out, "seconds": seconds}
            RoundLedger.write(folder, answers, details)
        self._world.gather(None)  # it is on disk before anybody goes on
        return RoundLedger(folder, answers)

    def _places(self, within: int) -> Sequence[int]:
        """Return the places in the ledger of the answers of a step, counted from the start of the round."""
        assert self._ledger is not None
        count = len(self._ledger.answers)
        return range(count * within // self._steps, count * (within + 1) // self._steps)


def _sound(folder: Path) -> RoundLedger | None:
    try:
        return RoundLedger.open(folder)
    except FailedPreconditionError:
        return None  # it is written again


def _opened(folder: Path) -> RoundLedger:
    ledger = RoundLedger.open(folder)
    if ledger is None:
        raise FailedPreconditionError(f"round: {folder} is not seen by all workers; they must share the run's folder")
    return ledger
