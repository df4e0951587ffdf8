"""Key `tracking` of a recipe: which trackers show the curves of its jobs, and what they need."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from services.base.atomic import write_whole
from services.base.credentials import refuse_credentials
from services.base.errors import SettingError
from services.jobs.run_folder import RunFolder

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_ENVIRONMENT = {
    "wandb": ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),
    "mlflow": ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
}
"""Variables that a job takes over from where it is submitted; secrets are not among them."""


@dataclass(frozen=True, slots=True)
class Tracking:
    """The trackers of a run.

    Attributes:
        names: key `tracking` of the recipe.
        experiment: name of the project at W&B and of the experiment at MLflow, unless the environment says otherwise.
        folder: folder of what W&B and MLflow write to files, of all runs of a recipe.
    """

    names: tuple[TrackerName, ...] = ("tensorboard",)
    experiment: str = "llm-fusion"
    folder: Path = Path("tracking")

    def check(self) -> None:
        """Raise SettingError for a tracker that is not installed here."""
        for name in self.names:
            if find_spec(_PACKAGES[name]) is None:
                raise SettingError("tracking", f"{name} is not installed here; the extra `tracking` has it")

    def environment(self) -> dict[str, str]:
        """Return what is set here of the variables that a submitted job needs; ValueError for a URL with a password."""
        names = [name for tracker in self.names for name in _ENVIRONMENT.get(tracker, ())]
        found = {name: os.environ[name] for name in names if os.environ.get(name)}
        for name, value in found.items():
            refuse_credentials(value, name)  # Ray's dashboard shows the environment of a job
        return found


def kept_id(files: RunFolder, tracker: str, make: Callable[[], str]) -> str:
    """Return the id under which the tracker knows the run, made once and kept in the run's folder."""
    known: dict[str, str] = json.loads(files.tracked.read_text()) if files.tracked.exists() else {}
    if tracker not in known:
        known[tracker] = make()
        write_whole(files.tracked, json.dumps(known))
    return known[tracker]


def settings_of(files: RunFolder) -> dict[str, Any]:
    """Return the settings in the run's record; empty where there is none."""
    if not files.record.exists():
        return {}
    settings: dict[str, Any] = json.loads(files.record.read_text(encoding="utf-8"))["settings"]
    return settings
