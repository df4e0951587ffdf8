"""MLflow as a tracker, in files unless MLFLOW_TRACKING_URI says otherwise."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from services.jobs.run_folder import RunFolder
from services.jobs.tracking.config import Tracking, kept_id, settings_of

_MLFLOW_BATCH = 100
"""The most parameters that MLflow takes at once."""
_MLFLOW_VALUE = 500
"""The most characters of a parameter's value."""


class Mlflow:
    """A run of MLflow under the id that the run's folder keeps, at MLFLOW_TRACKING_URI or else in files."""

    def __init__(self, tracking: Tracking, run_name: str, files: RunFolder, after_step: int) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (tracking.folder / "mlflow").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would have a database instead
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read when MLflow is imported
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", tracking.experiment)
        self._run_id = kept_id(files, "mlflow", lambda: self._new_run(experiment, run_name, files))
        if after_step:
            self._client.update_run(self._run_id, status="RUNNING")
        # A kill in the middle of a step leaves some of its figures.
        self._last_steps = {
            key: max(metric.step for metric in self._client.get_metric_history(self._run_id, key))
            for key in self._client.get_run(self._run_id).data.metrics
        }
        self.last_step = min(self._last_steps.values(), default=0)

    def _new_run(self, experiment: str, run_name: str, files: RunFolder) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        def experiment_id() -> str | None:
            found = self._client.get_experiment_by_name(experiment)
            return None if found is None else str(found.experiment_id)

        if (number := experiment_id()) is None:
            try:
                number = self._client.create_experiment(experiment)
            except MlflowException:
                if (number := experiment_id()) is None:  # else another run has just made it
                    raise
        run_id = str(self._client.create_run(number, run_name=run_name).info.run_id)
        params = [Param(_mlflow_key(k), str(v)[:_MLFLOW_VALUE]) for k, v in settings_of(files).items()]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(run_id, params=params[start : start + _MLFLOW_BATCH])
        return run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {_mlflow_key(key): value for key, value in figures.items()}
        new = [Metric(key, v, now, step) for key, v in named.items() if step > self._last_steps.get(key, 0)]
        self._client.log_batch(self._run_id, metrics=new)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _mlflow_key(key: str) -> str:
    """Return a key with the characters that MLflow allows."""
    return re.sub(r"[^\w.\-/: ]", "_", key)
