"""The curves of a run, at each tracker that the recipe names: TensorBoard, Weights & Biases, MLflow.

`metrics.jsonl` is the truth, and trackers follow it. A run that is resumed goes on under the same id: a tracker gets no
step twice, and what a kill took from it is filled in from the log. Nothing leaves the machine unless the user's
environment says so: without WANDB_MODE, W&B works offline, and without MLFLOW_TRACKING_URI, MLflow writes files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from services.base.credentials import without_credentials
from services.base.errors import SettingError
from services.jobs.run_folder import RunFolder
from services.jobs.step_log import read_rows
from services.jobs.tracking.config import Tracking
from services.jobs.tracking.mlflow_runs import Mlflow
from services.jobs.tracking.tensorboard import TensorBoard
from services.jobs.tracking.weights_and_biases import WeightsAndBiases

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One tracker's side of a run.

    Attributes:
        last_step: the last step that it has for certain; 0 for none.
    """

    last_step: int

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step, each once, however often the step is taken."""
        ...

    def close(self, *, failed: bool) -> None:
        """Bring all to its place."""
        ...


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step's metrics, by their keys."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class Trackers:
    """The trackers of one attempt at a run, as a context that ends them. A row is a line of `metrics.jsonl`.

    A tracker that cannot be opened when a run starts is an error. Later, one that fails is left out with a warning, and
    has its gap filled when the run is resumed.
    """

    def __init__(
        self,
        tracking: Tracking,
        run_name: str,
        files: RunFolder,
        *,
        after_step: int,
        figures: Callable[[Mapping[str, Any]], Mapping[str, float]] = numbers_of,
    ) -> None:
        """Open all trackers of a run that goes on behind `after_step`; `figures` are the curves of a row.

        Raises SettingError.
        """
        tracking.check()
        self._figures = figures
        self._trackers: dict[str, Tracker] = {}
        for name in tracking.names:
            try:
                self._trackers[name] = _OPEN[name](tracking, run_name, files, after_step)
            except Exception as error:
                if not after_step:
                    self.close(failed=True)
                    raise SettingError("tracking", f"{name}: {_words(error)}") from error
                logger.warning("tracking: %s is left out: %s", name, _words(error))
        behind = min((tracker.last_step for tracker in self._trackers.values()), default=after_step)
        for row in read_rows(files.metrics) if behind < after_step else ():
            if row["step"] <= after_step:
                self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of a step wherever they are not yet."""
        step, figures = row["step"], self._figures(row)
        for name, tracker in list(self._trackers.items()):
            if step <= tracker.last_step:
                continue
            try:
                tracker.log(step, figures)
            except Exception as error:  # a server that is away must not end the training
                logger.warning("tracking: %s is left out from step %d on: %s", name, step, _words(error))
                del self._trackers[name]

    def close(self, *, failed: bool) -> None:
        """End all trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(failed=failed)
            except Exception as error:
                logger.warning("tracking: %s: %s", name, _words(error))
        self._trackers = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(failed=error is not None)


def _words(error: Exception) -> str:
    """Return an error's message; a server's URL in it may hold a password."""
    return without_credentials(str(error))


_OPEN: dict[str, Callable[[Tracking, str, RunFolder, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
}
