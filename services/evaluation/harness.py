"""lm-evaluation-harness on task files that lie on this machine: nothing is downloaded.

The harness is the extra `lm-eval`; task files are its own YAML, whose `dataset_path: json` with
`dataset_kwargs: {data_files: {test: /path/to/file.jsonl}}` names local data.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from fusion_core.arrays import Float64

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class TaskDocuments:
    """The number of a task's documents, and the hash of its settings and documents."""

    number: int
    identity: str


def evaluate_tasks(
    folder: Path, tasks: Path, *, device: Device = "auto", batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Run every task of the folder `tasks` on the model in `folder`; return the numbers of each, by the harness' names.

    Raises ValueError when the harness is not installed, or naming the folder that has no tasks, or the task that fails.
    """
    try:
        manager = _open(tasks)
        found = _evaluate(folder, manager, sorted(manager.all_tasks), device, batch_size)
    except ValueError as error:
        raise ValueError(f"--tasks: {error}") from error
    return {
        task: {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }


def read_tasks(tasks: Path) -> dict[str, TaskDocuments]:
    """Return what is in every task of a folder, by name; ValueError as `evaluate_tasks`, without its option's name."""
    manager = _open(tasks)
    with _named(f"{', '.join(manager.all_subtasks)} in {tasks}"):
        loaded = manager.load(sorted(manager.all_subtasks))["tasks"]
        return {name: _documents(task) for name, task in sorted(loaded.items())}


def score_tasks(folder: Path, tasks: Path, *, device: Device = "auto", batch_size: int = 8) -> dict[str, Float64]:
    """Return the score of every document of every task, for the model in `folder`.

    The score is the task's first metric that gives each document a number and is better when it is higher, after the
    first of its filters. Raises ValueError naming the task that has none.
    """
    manager = _open(tasks)
    found = _evaluate(folder, manager, sorted(manager.all_subtasks), device, batch_size)
    return {
        name: _first_scores(name, samples, found["higher_is_better"].get(name, {}))
        for name, samples in found["samples"].items()
    }


def _first_scores(task: str, samples: list[dict[str, Any]], higher_is_better: dict[str, Any]) -> Float64:
    chosen = sorted(
        (sample for sample in samples if sample["filter"] == samples[0]["filter"]), key=lambda sample: sample["doc_id"]
    )
    for metric in samples[0]["metrics"]:
        values = [sample.get(metric) for sample in chosen]
        if higher_is_better.get(metric) and all(isinstance(value, int | float | np.number) for value in values):
            return np.array(values, dtype=np.float64)
    raise ValueError(f"{task}: none of {', '.join(samples[0]['metrics'])} gives each document a number to be raised")


def _documents(task: Any) -> TaskDocuments:
    digest = hashlib.sha256(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
    for document in task.eval_docs:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return TaskDocuments(len(task.eval_docs), digest.hexdigest()[:32])


def _open(tasks: Path) -> Any:
    """Return the harness' index of the tasks in a folder."""
    files = sorted(tasks.glob("**/*.yaml"))
    if not files:
        raise ValueError(f"no *.yaml in {tasks}")
    for file in files:  # the harness passes over a file that it cannot read
        try:
            list(yaml.parse(file.read_bytes()))
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from error
    # Data that a task names must lie here: the packages read these when they are imported, and keep them.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_DATASETS_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"needs the extra lm-eval (pip install 'llm-fusion[lm-eval]'): {error}") from error
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    if not manager.all_subtasks:
        raise ValueError(f"no task in {tasks}; a task file has the key `task`")
    return manager


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Raise ValueError naming the tasks for what the harness and its data raise."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DatasetsError as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from error
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _evaluate(folder: Path, manager: Any, names: list[str], device: Device, batch_size: int) -> dict[str, Any]:
    import lm_eval
    import torch

    where = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    with _named(f"{', '.join(names)} on {folder}"):
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=names,
            task_manager=manager,
            device=where,
            batch_size=batch_size,
        )
    return dict(found)
