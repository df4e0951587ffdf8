"""Held-out material of the gate: prompts, texts and tasks that no stage learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.base.errors import SettingError
from services.corpus.readers import local_files
from services.evaluation.harness import TaskDocuments, read_tasks
from services.evaluation.intervals import MIN_DOCUMENTS
from services.posttrain.config import GateConfig, TrainingSettings
from services.posttrain.data.rows import VerifiedPrompt, read_rows, verified_prompts

_WINDOW_BYTES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The prompts, texts and tasks that no stage learns from; `documents` names the document of each text."""

    prompts: list[VerifiedPrompt]
    texts: list[str]
    documents: list[str]
    tasks: dict[str, TaskDocuments] = field(default_factory=dict)


def read_held_out(gate: GateConfig) -> HeldOut:
    """Return what the gate holds out; SettingError naming file and line, or when prompts or documents are too few."""
    prompts = verified_prompts("gate.prompts", gate.prompts)
    if len(prompts) < MIN_DOCUMENTS:
        raise SettingError("gate.prompts", f"{len(prompts)} prompts give no interval; at least {MIN_DOCUMENTS}")
    texts, documents = [], []
    for name, text in _documents(gate.texts):
        for start in range(0, len(text), _WINDOW_BYTES):
            if window := text[start : start + _WINDOW_BYTES].strip():
                texts.append(window)
                documents.append(name)
    return HeldOut(prompts, texts, documents, _tasks(gate.tasks))


def _documents(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    if not patterns:
        return
    try:
        files = local_files(patterns)
    except SettingError as error:
        raise SettingError("gate.texts", error.problem) from error
    for path in files:
        if path.suffix == ".jsonl":
            for where, row in read_rows("gate.texts", [str(path)]):
                if not isinstance(row.get("text"), str):
                    raise SettingError("gate.texts", f"{where}: needs `text`, a string")
                yield where, row["text"]
        else:
            yield str(path), path.read_text(encoding="utf-8", errors="replace")


def _tasks(folder: str | None) -> dict[str, TaskDocuments]:
    if folder is None:
        return {}
    try:
        found = read_tasks(Path(folder))
    except ValueError as error:
        raise SettingError("gate.tasks", str(error)) from error
    for name, documents in found.items():
        if documents.number < MIN_DOCUMENTS:
            raise SettingError("gate.tasks", f"{name} has {documents.number} documents, at least {MIN_DOCUMENTS}")
    return found


def check_aim(stage: TrainingSettings, held_out: HeldOut) -> None:
    """Raise SettingError unless there are enough held-out prompts of a stage's skill, or its task is there."""
    if stage.task is not None and stage.task not in held_out.tasks:
        raise SettingError("task", f"gate.tasks has no {stage.task!r}; known: {', '.join(held_out.tasks) or 'none'}")
    there = sum(prompt.skill == stage.skill for prompt in held_out.prompts)
    if stage.skill is not None and there < MIN_DOCUMENTS:
        known = ", ".join(sorted({prompt.skill for prompt in held_out.prompts if prompt.skill})) or "none"
        raise SettingError(
            "skill",
            f"gate.prompts has {there} prompts of {stage.skill!r}, at least {MIN_DOCUMENTS} are needed; known: {known}",
        )


def gate_identity(gate: GateConfig, held_out: HeldOut, stage: TrainingSettings) -> str:
    """Return what decides a gate's decision on a given stage, as text."""
    settings = gate.model_dump(mode="json", exclude={"prompts", "texts", "tasks", "batch_size", "overlap_share"})
    prompts = [[prompt.prompt, prompt.verify, prompt.skill] for prompt in held_out.prompts]
    tasks = {name: documents.identity for name, documents in held_out.tasks.items()}
    return json.dumps([settings, stage.skill, stage.task, prompts, held_out.texts, tasks], sort_keys=True)
