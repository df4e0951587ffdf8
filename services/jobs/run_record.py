"""`run.json`: under which settings and versions a run was started; what a resumed run must agree with."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.base.errors import FailedPreconditionError
from services.base.version import git_revision
from services.jobs.run_folder import RunFolder
from services.jobs.storage import newest_complete

_PACKAGES = ("llm-fusion", "torch", "transformers", "tokenizers", "ray", "numpy", "grpcio", "peft")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What `run.json` says of a run.

    Attributes:
        run_name: name of the run.
        settings: by dotted key, what decides the outcome; a checkpoint made under others is not resumed.
        identity: hash of the settings, which every checkpoint carries.
        details: whatever else is worth keeping; it decides nothing.
        recipe: the resolved recipe, YAML, kept beside the record; empty for none.
    """

    run_name: str
    settings: dict[str, Any]
    identity: str
    details: dict[str, Any]
    recipe: str = ""


def claim_run_folder(record: RunRecord, files: RunFolder, checkpoints: str) -> None:
    """Writes `run.json` and the run's recipe; `checkpoints` is the folder or URL of the run's checkpoints.

    Raises FailedPreconditionError naming the setting that differs from those of a checkpoint that this run would go on
    from.
    """
    path = files.record
    newest = newest_complete(checkpoints)
    if newest is not None and path.exists():
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        now: dict[str, Any] = json.loads(json.dumps(record.settings))
        for key in now | earlier:
            if earlier.get(key) != now.get(key):
                raise FailedPreconditionError(
                    f"{key}: run {record.run_name} was started with {earlier.get(key)!r}, now {now.get(key)!r} is "
                    "asked; start over (--start-over) or choose another run name"
                )
    if newest is not None and newest.plan != record.identity:
        raise FailedPreconditionError(
            f"checkpoint: {newest.name} in {newest.location} belongs to another target, data set or training settings; "
            "start over (--start-over) or choose another run name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "run_name": record.run_name,
        "settings": record.settings,
        **record.details,
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    _write(path, json.dumps(values, indent=2))
    if record.recipe:
        _write(files.recipe, record.recipe)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
