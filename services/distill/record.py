"""`run.json`: under which settings and versions a run was started; what a resumed run must agree with."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from services.common.errors import FailedPreconditionError
from services.common.version import git_revision
from services.distill.job import DistillJob
from services.distill.plan import RunPlan
from services.distill.storage import newest_complete

_PACKAGES = ("llm-fusion", "torch", "transformers", "tokenizers", "ray", "numpy", "grpcio", "peft")


def claim_run_folder(job: DistillJob, plan: RunPlan) -> None:
    """Writes `run.json` and the run's recipe.

    Raises FailedPreconditionError naming the setting that differs from those of a checkpoint that this run would go on
    from.
    """
    path = job.files.record
    newest = newest_complete(job.checkpoints)
    if newest is not None and path.exists():
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        now: dict[str, Any] = json.loads(json.dumps(plan.settings))
        for key in now | earlier:
            if earlier.get(key) != now.get(key):
                raise FailedPreconditionError(
                    f"{key}: run {job.run_name} was started with {earlier.get(key)!r}, now {now.get(key)!r} is asked; "
                    "start over (--start-over) or choose another run name"
                )
    if newest is not None and newest.plan != plan.identity:
        raise FailedPreconditionError(
            f"checkpoint: {newest.name} in {newest.location} belongs to another target, data set or training settings; "
            "start over (--start-over) or choose another run name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "run_name": job.run_name,
        "settings": plan.settings,
        "config": job.config.model_dump(mode="json", by_alias=True),
        "total_steps": plan.total_steps(job.config),
        "dataset": f"{job.dataset}/{job.split}",
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    _write(path, json.dumps(record, indent=2))
    if job.recipe:
        _write(job.files.recipe, job.recipe)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
