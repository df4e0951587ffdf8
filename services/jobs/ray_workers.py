"""Workers of Ray Train whose checkpoints lie in the run's own folder, which all of them see."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from services.base.errors import ServiceError

FATAL_ERRORS = (ServiceError, ValueError, ArithmeticError)
"""Errors that would come again in another attempt of the same workers."""


class WorkerSettings(Protocol):
    """The settings of a section that say how its workers run."""

    @property
    def num_workers(self) -> int: ...

    @property
    def cpus_per_worker(self) -> float: ...

    @property
    def max_failures(self) -> int: ...


def run_workers(work: Callable[[], None], folder: Path, settings: WorkerSettings, *, use_gpu: bool) -> None:
    """Run `work` to its end on every worker; raises an error of `FATAL_ERRORS` that another attempt would meet again.

    Raises ray.train.TrainingFailedError when workers failed more often than `max_failures`. Ray's own files go to
    `folder`/ray.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    state = folder / "ray"
    shutil.rmtree(state, ignore_errors=True)  # the checkpoints lie beside it: Ray's own list of them stays empty
    trainer = TorchTrainer(
        partial(_work, work, alone=settings.num_workers == 1),  # type: ignore[arg-type]  # type checkers see V1 here
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="train",
            storage_path=str(state.absolute()),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    fatal: Exception | None = trainer.fit().return_value  # type: ignore[attr-defined]
    if fatal is not None:
        raise fatal


def _work(work: Callable[[], None], *, alone: bool) -> Exception | None:
    """Run one worker; return an error that another attempt would meet again."""
    try:
        work()
    except FATAL_ERRORS as error:
        if not alone:
            raise  # the others wait for this worker: only its end tells them
        return error
    return None


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process of a Ray job with 2 where the recipe does not allow the run, and with 1 where training failed."""
    from ray.train import TrainingFailedError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        yield
    except (TrainingFailedError, ArithmeticError) as error:
        print(f"error: training failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (ServiceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
