"""The routing of a run with experts in its report: a table, and a picture of layers by experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.evaluation.report.pictures import draw_experts
from services.jobs.run_folder import RunFolder


def expert_sections(runs: Mapping[str, Path], folder: Path) -> list[list[str]]:
    """Return a section of Markdown for each run that left a routing.json; pictures are written to `folder`.

    `runs` maps the name of a run to its metrics.jsonl.
    """
    sections = []
    for name, metrics in runs.items():
        path = RunFolder(metrics.parent).routing
        if path.exists():
            routing = json.loads(path.read_text(encoding="utf-8"))
            picture = draw_experts(routing, folder / f"experts_{name}.png")
            sections.append([*_table(name, routing), "", f"![experts of {name}]({picture.name})"])
    return sections


def _table(name: str, routing: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## Experts of {name}",
        "",
        f"Step {routing['step']:,}, {routing['tokens']:,} tokens. Load CV: standard deviation of the experts' loads "
        "over their mean. Balance: DeepSeekMoE's loss of a layer, 1 when even. Entropy of the router in nats.",
        "",
        "| layer | load CV | dead experts | entropy | balance |",
        "| --- | --- | --- | --- | --- |",
    ]
    columns = ("layers", "load_cv", "dead_experts", "router_entropy", "balance")
    for layer, cv, dead, entropy, balance in zip(*(routing[key] for key in columns), strict=True):
        lines.append(f"| {layer} | {cv:.3f} | {dead} | {entropy:.3f} | {balance:.3f} |")
    return lines
