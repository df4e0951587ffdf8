"""The part that a trained model plays in a comparison: the fused target, or one of its controls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from services.jobs.run_folder import RunFolder

CLM_ONLY, FUSED = "clm_only", "fused"
"""Names of the quickstart's runs; they also tell the kind of a run without a record."""
_EXPERTS = "experts "
"""Start of the name of a mixture of experts."""


@dataclass(frozen=True, slots=True)
class Training:
    """The kind of a model's training: `clm` only, on the rows of one source (`single`) or of several (`fused`).

    `shape` names a mixture of experts and a curriculum; empty for a target as it is, trained in epochs.
    """

    kind: Literal["clm", "single", "fused"]
    sources: tuple[str, ...] = ()
    shape: str = ""

    def __str__(self) -> str:
        taught_by = "CLM only" if self.kind == "clm" else f"fused: {', '.join(self.sources) or 'all'}"
        if self.kind == "single":
            taught_by = f"{self.sources[0]} alone"
        return f"{taught_by}; {self.shape}" if self.shape else taught_by

    @property
    def dense_shape(self) -> str:
        """The shape without its experts."""
        return "; ".join(part for part in self.shape.split("; ") if not part.startswith(_EXPERTS))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Training:
        return cls(kind=value["kind"], sources=tuple(value["sources"]), shape=value.get("shape", ""))


def training_of(run_folder: Path) -> Training | None:
    """Return the kind of a run by its `run.json`, else by the folder's name; None where neither tells."""
    try:
        settings = json.loads(RunFolder(run_folder).record.read_text(encoding="utf-8"))["settings"]
        sources = tuple(settings["distill.sources"])
    except (OSError, ValueError, KeyError, TypeError):
        by_name: dict[str, Training] = {CLM_ONLY: Training("clm"), FUSED: Training("fused")}
        return by_name.get(run_folder.name)
    shape = _shape(settings.get("distill.moe"), settings.get("distill.stages"))
    if settings["distill.lambda"] == 1 and settings["distill.lambda_end"] in {None, 1}:
        return Training("clm", shape=shape)
    return Training("single" if len(sources) == 1 else "fused", sources, shape)


def _shape(moe: Mapping[str, Any] | None, stages: Sequence[Mapping[str, Any]] | None) -> str:
    """Return the name of a mixture of experts and a curriculum, as `run.json` records them."""
    parts = []
    if moe:
        parts.append(f"{_EXPERTS}{moe['init']} {moe['shards']}-{moe['shared']}-{moe['copies']}")
    if stages:
        parts.append(f"stages {', '.join(stage['name'] for stage in stages)}")
    return "; ".join(parts)


def comparisons(trainings: Mapping[str, Training]) -> list[tuple[str, str]]:
    """Return pairs of a model and the control that it is compared with.

    A model trained on sources is compared with CLM only, one trained on several also with each source alone: with those
    of its own shape, because experts or a curriculum make a difference of their own. A mixture of experts is compared
    with the dense target that is trained as it is.
    """
    pairs = []
    for name, training in trainings.items():
        for control, its in trainings.items():
            if training.shape != its.shape:
                if its == replace(training, shape=training.dense_shape):
                    pairs.append((name, control))
            elif (training.kind != "clm" and its.kind == "clm") or (training.kind == "fused" and its.kind == "single"):
                pairs.append((name, control))
    return pairs
