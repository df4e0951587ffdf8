"""`report.md` and loss curves of a run folder: what was reached, and at which cost.

A run folder holds `summary.json` (nats per byte of every model) and training runs, each a folder with `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.distill.curves import draw_evaluations, draw_loss, draw_source_weights
from services.distill.runlog import read_rows
from services.distill.summary import RunSummary, summarise

CLM_ONLY, FUSED = "clm_only", "fused"
"""Names of the two training runs that the verdict compares."""


def write_report(run_folder: Path) -> Path:
    """Writes report.md and its pictures into the run folder; returns the path of report.md.

    Raises ValueError when there is nothing to report on.
    """
    runs = dict(_training_runs(run_folder))
    summary = _read_summary(run_folder / "summary.json")
    if not runs and not summary:
        raise ValueError(f"{run_folder}: no summary.json and no metrics.jsonl; there is no run to report on")
    pictures = [
        draw_loss({name: read_rows(path) for name, path in runs.items()}, "clm", run_folder / "loss_clm.png"),
        draw_loss({name: read_rows(path) for name, path in runs.items()}, "fusion", run_folder / "loss_fusion.png"),
        draw_source_weights({name: read_rows(path) for name, path in runs.items()}, run_folder / "source_weights.png"),
        draw_evaluations(
            {name: read_rows(path.with_name("evaluations.jsonl")) for name, path in runs.items()},
            run_folder / "held_out.png",
        ),
    ]
    totals = {name: totals for name, path in runs.items() if (totals := summarise(path)) is not None}
    sections = [
        [f"# {summary.get('name', run_folder.resolve().name)}"],
        _held_out(summary, set(totals)),
        _training(totals),
        _sources(totals),
        [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures if path is not None],
        _provenance(summary),
    ]
    report = run_folder / "report.md"
    report.write_text("\n\n".join("\n".join(lines) for lines in sections if lines) + "\n", encoding="utf-8")
    return report


def verdict(nats_per_byte: dict[str, float]) -> str | None:
    """One sentence: was the fused target better than the same target without fusion? None when one is missing."""
    clm_only, fused = nats_per_byte.get(CLM_ONLY), nats_per_byte.get(FUSED)
    if clm_only is None or fused is None:
        return None
    difference = f"{abs(clm_only - fused):.4f} nats per byte ({100 * abs(clm_only - fused) / clm_only:.2f} %)"
    if fused < clm_only:
        return (
            f"**The fused target is better than CLM only by {difference}.** This is one seed: a difference of this "
            "size needs several before anyone builds on it."
        )
    if fused == clm_only:
        return "**The fused target is NOT better than CLM only: both score the same.**"
    return f"**The fused target is NOT better than CLM only: it is worse by {difference}.**"


def _training_runs(run_folder: Path) -> Iterator[tuple[str, Path]]:
    """Metrics of every training run below the folder; of the folder itself when it is one."""
    below = sorted(run_folder.glob("*/metrics.jsonl"))
    for path in below or [run_folder / "metrics.jsonl"]:
        if path.exists():
            yield path.parent.resolve().name, path


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping")
    return value


def _held_out(summary: dict[str, Any], targets: set[str]) -> list[str]:
    scores: dict[str, float] = summary.get("nats_per_byte", {})
    if not scores:
        return ["Not evaluated yet: there is no `nats_per_byte` in summary.json."]
    lines = ["## Held-out text", ""]
    lines += _table(
        ["model", "nats per byte", "bits per byte", ""],
        [
            [name, f"{value:.4f}", f"{value / math.log(2):.4f}", "target" if name in targets else "source"]
            for name, value in sorted(scores.items(), key=lambda item: item[1])
        ],
    )
    fused_rows = summary.get("nats_per_byte_fused_rows")
    if fused_rows is not None:
        lines += ["", f"The fused rows themselves, before any training: {fused_rows:.4f} nats per byte."]
    sentence = verdict(scores)
    return [*lines, "", sentence] if sentence else lines


def _training(totals: dict[str, RunSummary]) -> list[str]:
    if not totals:
        return []
    rows = [
        [
            name,
            f"{run.steps:,}",
            f"{run.tokens:,}",
            f"{run.windows:,}",
            f"{run.tokens_per_second:,.0f}",
            f"{100 * run.wait_share:.1f} %",
            f"{run.clm:.4f}",
            "-" if run.fusion is None else f"{run.fusion:.4f}",
            "-" if run.masked_share is None else f"{100 * run.masked_share:.2f} %",
            "-" if run.covered_mass is None else f"{run.covered_mass:.4f}",
        ]
        for name, run in totals.items()
    ]
    head = [
        "run", "steps", "tokens", "windows", "tokens/s", "waiting", "CLM", "fusion", "masked", "covered mass",
    ]  # fmt: skip
    return [
        "## Training",
        "",
        *_table(head, rows),
        "",
        "CLM and fusion: nats per token over the last tenth of the steps. Waiting: share of the training time without "
        "data. Masked: share of tokens that the fusion loss left out. Covered mass: share of the sources' probability "
        "that reached the candidates.",
    ]


def _sources(totals: dict[str, RunSummary]) -> list[str]:
    names = sorted({name for run in totals.values() for name in run.source_weights})
    if not names:
        return []
    rows = [
        [name, *(f"{run.source_weights.get(source, 0.0):.3f}" for source in names)]
        for name, run in totals.items()
        if run.source_weights
    ]
    return ["## Weights of the sources", "", *_table(["run", *names], rows)]


def _provenance(summary: dict[str, Any]) -> list[str]:
    facts = []
    if "wall_seconds" in summary:
        facts.append(f"{summary['wall_seconds']:.0f} s in all")
    if summary.get("git_revision"):
        facts.append(f"revision {summary['git_revision']}")
    return [", ".join(facts)] if facts else []


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
