"""The accounts of a run: the windows that its steps have taken, counted alike for any number of workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from services.base.errors import FailedPreconditionError
from services.distill.plan import RunPlan
from services.distill.workers.world import World
from services.wire.cursor import Cursor, num_dealt


@dataclass(frozen=True, slots=True)
class Position:
    """The place of a run between two steps.

    Attributes:
        step: steps taken.
        windows: windows of the stream consumed by all workers since the start.
        tokens: tokens of these windows.
        cursor: position in the stream, the same for every rank and for any number of ranks: windows are counted as
            dealt, none as received since. None before the first step.
        identity: hash of the settings of the run that the position belongs to, see `RunPlan`.
        round: name of the round whose answers the last steps took, see `services.distill.on_policy`.
    """

    step: int
    windows: int
    tokens: int
    cursor: Cursor | None
    identity: str
    round: str | None = None


class Accounts:
    """The count of a run's windows, step by step. Epochs, or the stages of a curriculum, are the parts of its stream.

    Attributes:
        position: the place of the run after the last step.
    """

    def __init__(self, start: Position, world: World, plan: RunPlan, *, batch_windows: int) -> None:
        self.position = start
        self._world, self._block_windows, self._batch_windows = world, plan.block_windows, batch_windows
        self._ends = list(accumulate(plan.part_windows))
        # From this window of the epoch on, the stream deals windows to the present number of workers.
        self._shared_from = start.cursor.dealt if start.cursor else 0

    def shares(self, epoch: int) -> list[int]:
        """Return by rank the number of windows of the next step that the stream deals to a worker."""
        begin = self._begin(epoch)
        start = self.position.windows - begin
        stop = min(start + self._batch_windows, self._ends[epoch] - begin)
        size = self._world.size
        dealing = {"shared_from": self._shared_from, "block_windows": self._block_windows}
        return [num_dealt(rank, size, start, stop, **dealing) for rank in range(size)]

    def advance(self, row: Mapping[str, Any], cursor: Cursor | None, *, end_of_epoch: bool) -> dict[str, Any]:
        """Move the position behind a step; return the step's metrics with the totals of the run.

        `cursor` is the position of this rank's stream. Raises FailedPreconditionError when an epoch ends with another
        number of windows than the data set has.
        """
        tokens = self.position.tokens + row["tokens"]
        windows = self.position.windows + row["windows"] + row["skipped"]
        if (answers := row.get("on_policy")) is not None:
            windows -= answers["windows"] + answers["skipped"]
        expected = self._ends[row["epoch"]]
        if end_of_epoch and windows != expected:
            raise FailedPreconditionError(
                f"split: {windows} windows came until the end of epoch {row['epoch']}, not {expected}; "
                "the data set has changed"
            )
        if cursor is not None:
            epoch = row["epoch"] + end_of_epoch
            dealt = windows - self._begin(epoch)
            cursor = Cursor(epoch=epoch, dealt=dealt, received=0, plan=cursor.plan)
        if end_of_epoch:
            self._shared_from = 0
        cursor = cursor or self.position.cursor
        self.position = replace(self.position, step=row["step"], windows=windows, tokens=tokens, cursor=cursor)
        return {**row, "total_tokens": tokens, "total_windows": windows}

    def begin_round(self, name: str) -> None:
        """Note the round whose answers the next steps take."""
        self.position = replace(self.position, round=name)

    def _begin(self, epoch: int) -> int:
        """Return the number of the run's windows before an epoch."""
        return self._ends[epoch - 1] if epoch else 0
