"""The identity of a stage: the hash of its start, its rows and its settings. The same is resumed or skipped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from services.jobs.run_record import RunRecord, check_same_settings, claim_run_folder
from services.models.revision import weights_revision
from services.posttrain.config import PosttrainConfig, TrainingSettings
from services.posttrain.data.manifest import StageData
from services.posttrain.data.tokens import PromptTokens
from services.posttrain.job import StageJob

_NO_RESULT = {"name", "skill", "task", "save_steps", "save_total_limit", "data", "answers", "prompts"}
"""Settings of a stage that decide nothing of its weights; its rows stand for their files."""


def stage_settings(
    number: int, stage: TrainingSettings, config: PosttrainConfig, start: Path, tokens: PromptTokens, data: StageData
) -> dict[str, Any]:
    """Return all that decides the weights of a stage, by the dotted key of the recipe where there is one."""
    key = f"posttrain.stages[{number}]"
    settings = {f"{key}.{name}": value for name, value in stage.model_dump(mode="json", exclude=_NO_RESULT).items()}
    return {
        **settings,
        f"{key}.data": data.identity,
        "posttrain.start": weights_revision(start),
        "posttrain.chat_template": tokens.identity,
        "posttrain.num_workers": max(1, config.num_workers),
        "trl": importlib.metadata.version("trl"),
    }


def identity_of(settings: dict[str, Any]) -> str:
    """Return the hash of a stage's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def claim_stage(job: StageJob, settings: dict[str, Any], details: dict[str, Any], recipe: str) -> bool:
    """Write the stage's `run.json`; return whether its model is there already.

    Raises FailedPreconditionError naming the setting that differs from those of a model or a checkpoint in the folder.
    """
    record = RunRecord(job.name, settings, job.identity, details, recipe)
    if (job.files.model / "config.json").is_file():
        check_same_settings(record, job.files)
        return True
    claim_run_folder(record, job.files, str(job.files.checkpoints.absolute()))
    return False
