"""`run.json`: the settings and versions that a run was started under, which a resumed run must agree with."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from typing import Any

from services.base.atomic import write_whole
from services.base.errors import FailedPreconditionError
from services.base.version import git_revision
from services.jobs.run_folder import RunFolder
from services.jobs.storage import newest_complete

_PACKAGES = ("llm-fusion", "torch", "transformers", "tokenizers", "ray", "numpy", "grpcio", "peft", "trl")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of `run.json`.

    Attributes:
        run_name: name of the run.
        settings: everything that decides the result, by dotted key; a checkpoint made under others is not resumed.
        identity: hash of the settings, which every checkpoint carries.
        details: other facts worth keeping, which do not affect the result.
        recipe: the resolved recipe, YAML, kept beside the record; empty for none.
    """

    run_name: str
    settings: dict[str, Any]
    identity: str
    details: dict[str, Any]
    recipe: str = ""


def claim_run_folder(record: RunRecord, files: RunFolder, checkpoints: str) -> None:
    """Write `run.json` and the run's recipe; `checkpoints` is the folder or URL of the run's checkpoints.

    Raises FailedPreconditionError naming the setting that differs from those of a checkpoint that this run would go on
    from.
    """
    path = files.record
    newest = newest_complete(checkpoints)
    if newest is not None and path.exists():
        check_same_settings(record, files)
    if newest is not None and newest.identity != record.identity:
        raise FailedPreconditionError(
            f"checkpoint: {newest.name} in {newest.location} belongs to another target, data set or training settings; "
            "start over (--start-over) or choose another run name"
        )
    values = {
        "run_name": record.run_name,
        "settings": record.settings,
        **record.details,
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    write_whole(path, json.dumps(values, indent=2))
    if record.recipe:
        write_whole(files.recipe, record.recipe)


def check_same_settings(record: RunRecord, files: RunFolder) -> None:
    """Raise FailedPreconditionError naming the setting that differs from those that `run.json` has."""
    earlier: dict[str, Any] = json.loads(files.record.read_text(encoding="utf-8"))["settings"]
    now: dict[str, Any] = json.loads(json.dumps(record.settings))
    remedy = "start over (--start-over) or choose another run name"
    for key, value in earlier.items():
        if value != now.get(key):
            raise FailedPreconditionError(
                f"{key}: run {record.run_name} was started with {value!r}, now {now.get(key)!r} is asked; {remedy}"
            )
    if unrecorded := sorted(now.keys() - earlier.keys()):
        raise FailedPreconditionError(
            f"{unrecorded[0]}: run {record.run_name} did not record it when it was started (by an earlier version, "
            f"perhaps), now it is {now[unrecorded[0]]!r}; nothing says that the two agree, so {remedy}"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
