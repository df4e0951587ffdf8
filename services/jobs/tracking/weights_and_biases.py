"""Weights & Biases as a tracker, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

from services.jobs.run_folder import RunFolder
from services.jobs.tracking.config import Tracking, kept_id, settings_of


class WeightsAndBiases:
    """A run of W&B under the id that the run's folder keeps.

    Offline, W&B buffers, and a kill takes what it has not written: when the run is resumed, its files are written anew
    as a whole. Online, the server says which steps it has.
    """

    def __init__(self, tracking: Tracking, run_name: str, files: RunFolder, after_step: int) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it is read when W&B is imported
        import wandb

        run_id = kept_id(files, "wandb", lambda: uuid.uuid4().hex[:16])
        tracking.folder.mkdir(parents=True, exist_ok=True)
        for old in tracking.folder.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(old)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", tracking.experiment),
            name=run_name,
            id=run_id,
            dir=str(tracking.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=settings_of(files),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.last_step = max(0, self._run.step - 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
