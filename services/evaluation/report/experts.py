"""The routing of mixtures of experts in a report: load in training, and on the kinds of held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.evaluation.report.pictures import draw_experts, draw_specialisation
from services.jobs.run_folder import RunFolder

_DRAWN_LAYERS = 6
"""Most layers in a picture of experts by kind of text: those with most information."""
_KINDS = {"domain": "domain", "source": "preferred source"}


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


def specialisation_sections(evaluation: Mapping[str, Any], folder: Path) -> list[list[str]]:
    """Return a section of Markdown for each model of evaluation.json that has experts; pictures go to `folder`."""
    sections = []
    for name, found in evaluation.get("experts", {}).items():
        lines = [f"## Experts of {name} on {evaluation['split']}", ""]
        mean_cv = sum(found["load_cv"]) / len(found["load_cv"])
        lines += [f"Mean load CV {mean_cv:.3f}, {sum(found['dead_experts'])} dead experts in all layers.", ""]
        for key, kind in _KINDS.items():
            if key in found:
                path = folder / f"experts_{name.replace(' ', '_')}_by_{key}.png"
                lines += _specialisation(kind, found["layers"], found[key], path)
        sections.append(lines)
    return sections


def _specialisation(kind: str, layers: Sequence[int], found: Mapping[str, Any], path: Path) -> list[str]:
    """Return a table of the information between experts and kinds of text, and a picture of the loads."""
    information = found["information_nats"]
    telling = sorted(sorted(range(len(layers)), key=lambda place: -information[place])[:_DRAWN_LAYERS])
    draw_specialisation([layers[place] for place in telling], found["kinds"], [found["load"][p] for p in telling], path)
    columns = (layers, information, found["shuffled_nats"], found["shuffled_95_percent"])
    rows = [f"| {layer} | {a:.4f} | {b:.4f} | {c:.4f} |" for layer, a, b, c in zip(*columns, strict=True)]
    return [
        f"| layer | nats between expert and {kind} | shuffled documents | 95 % of them below |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"![experts by {kind}]({path.name})",
        "",
    ]
