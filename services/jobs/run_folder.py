"""The files of a run by name."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of all files in the folder of a run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Metrics, a line per step; see services/jobs/step_log.py."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """The windows that each step consumed, a line per step."""
        return self.path / "ledger.jsonl"

    @property
    def evaluations(self) -> Path:
        """Scores on the held-out split during training, a line each; see services/jobs/step_log.py."""
        return self.path / "evaluations.jsonl"

    @property
    def record(self) -> Path:
        """The settings and versions of the run; see services/jobs/run_record.py."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The recipe that the run follows."""
        return self.path / "recipe.yaml"

    @property
    def rounds(self) -> Path:
        """The target's own answers, of on-policy distillation: a folder for every round."""
        return self.path / "rounds"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, unless `distill.storage` names another place."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder; it appears at the end of the run."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The trained LoRA adapter, a peft folder; `model` holds it merged into the target."""
        return self.path / "adapter"

    @property
    def routing(self) -> Path:
        """Load of every expert in the step of the last checkpoint, for a target that has experts."""
        return self.path / "routing.json"

    @property
    def events(self) -> Path:
        """TensorBoard events."""
        return self.path / "events"

    @property
    def tracked(self) -> Path:
        """The ids under which trackers know the run; see services/jobs/tracking."""
        return self.path / "tracking.json"

    def clear(self) -> None:
        """Delete the files of a run. Other files in the folder stay."""
        logs = (self.metrics, self.ledger, self.evaluations)
        for file in (*logs, self.record, self.recipe, self.routing, self.tracked):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.model, self.adapter, self.events, self.rounds):
            if folder.exists():
                shutil.rmtree(folder)
