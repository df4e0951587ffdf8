"""`report.md` and `report.html` of a run folder: scores, training and its cost, with pictures.

A run folder holds `summary.json` (nats per byte of every model) or `evaluation.json` (with intervals, by domain), and
training runs, each a folder with `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from services.evaluation.controls import Training, comparisons, training_of
from services.evaluation.intervals import ALL, MIN_DOCUMENTS
from services.evaluation.report.experts import expert_sections, specialisation_sections
from services.evaluation.report.html_page import write_page
from services.evaluation.report.opening import opening, paired_verdicts, with_interval
from services.evaluation.report.pictures import (
    draw_domains,
    draw_evaluations,
    draw_loss,
    draw_source_weights,
    draw_step_values,
)
from services.evaluation.report.run_summary import RunSummary, summarise
from services.jobs.step_log import read_rows

EVALUATION = "evaluation.json"
"""Name of the file that `fusion eval` writes: scores with intervals, per domain."""
DOMAINS = "domains.png"


def write_report(run_folder: Path) -> Path:
    """Write report.md with its pictures and report.html, one page with all of it; return the path of report.md.

    Raises ValueError when there is nothing to report on.
    """
    runs = dict(_training_runs(run_folder))
    summary = _read_mapping(run_folder / "summary.json")
    evaluation = _read_mapping(run_folder / EVALUATION)
    if not runs and not summary and not evaluation:
        raise ValueError(f"{run_folder}: no summary.json and no metrics.jsonl; there is no run to report on")
    totals = {name: totals for name, path in runs.items() if (totals := summarise(path)) is not None}
    title = summary.get("name", run_folder.resolve().name)
    trainings, scores = _trainings(evaluation, run_folder), summary.get("nats_per_byte", {})
    pictures = _pictures(runs, evaluation, trainings, run_folder)
    sections = [
        [f"# {title}"],
        opening(scores, evaluation, trainings, totals),
        _shown([path for path in pictures if path.name == DOMAINS]),
        _held_out(summary, evaluation, set(totals)) if summary or not evaluation else [],
        _domains(evaluation, trainings),
        _tasks(evaluation),
        _training(totals),
        _stages(totals),
        _sources(totals),
        *expert_sections(runs, run_folder),
        *specialisation_sections(evaluation, run_folder),
        _shown([path for path in pictures if path.name != DOMAINS]),
        _provenance(summary),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
    report = run_folder / "report.md"
    report.write_text(text, encoding="utf-8")
    write_page(text, title, run_folder / "report.html")
    return report


def _shown(pictures: list[Path]) -> list[str]:
    """Return pictures in one paragraph: the page puts them side by side."""
    return [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]


def _pictures(
    runs: dict[str, Path], evaluation: dict[str, Any], trainings: dict[str, Training], folder: Path
) -> list[Path]:
    steps = {name: read_rows(path) for name, path in runs.items()}
    for rows in steps.values():
        for row in rows:
            row["wait_share"] = row["data_wait_seconds"] / row["step_seconds"] if row["step_seconds"] else 0.0
    while_training = {name: read_rows(path.with_name("evaluations.jsonl")) for name, path in runs.items()}
    drawn = [
        draw_domains(evaluation.get("domains", {}), comparisons(trainings), folder / DOMAINS),
        draw_loss(steps, "clm", folder / "loss_clm.png"),
        draw_loss(steps, "fusion", folder / "loss_fusion.png"),
        draw_evaluations(while_training, folder / "held_out.png"),
        draw_source_weights(steps, folder / "source_weights.png"),
    ]
    mass = {"covered_mass": "covered mass", "masked_share": "masked tokens"}
    if _exceeds(steps, "masked_share", 0.005) or _exceeds(steps, "covered_mass", 0.98, below=True):
        drawn.append(draw_step_values(steps, mass, "share", folder / "mass.png"))
    if _exceeds(steps, "wait_share", 0.05):
        label = "share of a step spent waiting for data"
        drawn.append(draw_step_values(steps, {"wait_share": ""}, label, folder / "data_wait.png"))
    return [path for path in drawn if path is not None]


def _exceeds(runs: dict[str, list[dict[str, Any]]], key: str, limit: float, *, below: bool = False) -> bool:
    """Return whether a value's mean over the steps of any run is above the limit, or below it: worth a picture."""
    means = [mean(found) for rows in runs.values() if (found := [row[key] for row in rows if row[key] is not None])]
    return any(value < limit if below else value > limit for value in means)


def _training_runs(run_folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and metrics.jsonl of every training run below the folder; of the folder itself when it is one."""
    below = sorted(run_folder.glob("*/metrics.jsonl"))
    for path in below or [run_folder / "metrics.jsonl"]:
        if path.exists():
            yield path.parent.resolve().name, path


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping")
    return value


def _held_out(summary: dict[str, Any], evaluation: dict[str, Any], targets: set[str]) -> list[str]:
    """Return the scores that have no interval below: each score stands in the report once."""
    scores: dict[str, float] = summary.get("nats_per_byte", {})
    if not scores and not evaluation:
        return ["Not evaluated yet: there is no `nats_per_byte` in summary.json."]
    below = evaluation.get("domains", {}).get(ALL, {}).get("models", {})
    rows = [
        [name, f"{value:.4f}", f"{value / math.log(2):.4f}", "target" if name in targets else "source"]
        for name, value in sorted(scores.items(), key=lambda item: item[1])
        if name not in below and f"source {name}" not in below
    ]
    lines = _table(["model", "nats per byte", "bits per byte", ""], rows) if rows else []
    fused_rows = summary.get("nats_per_byte_fused_rows")
    if fused_rows is not None:
        lines += ["", f"The fused rows themselves, before any training: {fused_rows:.4f} nats per byte."]
    return ["## Held-out text", "", *lines] if lines else []


def _domains(evaluation: dict[str, Any], trainings: dict[str, Training]) -> list[str]:
    """Return a table per domain, and verdicts: are fused targets better than their controls beyond the interval?"""
    lines: list[str] = []
    for domain, result in evaluation.get("domains", {}).items():
        ranked = sorted(result["models"].items(), key=lambda item: item[1]["nats_per_byte"]["value"])
        # A record may name any text as its domain: here it stays on its line.
        lines += [f"## {evaluation['corpus']}/{evaluation['split']}: {' '.join(domain.split())}", ""]
        lines += _table(
            ["model", "taught by", "nats per byte", "95 % interval", "next-token accuracy"],
            [
                [
                    name,
                    str(trainings.get(name, "")),
                    *with_interval(values["nats_per_byte"], result["documents"]),
                    f"{100 * values['accuracy']['value']:.1f} %",
                ]
                for name, values in ranked
            ],
        )
        lines += [
            "",
            f"{result['bytes']:,} bytes in {result['documents']} documents{_too_few(result['documents'])}.",
            "",
        ]
        lines += paired_verdicts(result, trainings) if domain != ALL else []  # those of all domains open the report
    if lines:
        lines.append(
            "Intervals: bootstrap over documents; differences are paired. Accuracy: share of the positions where a "
            "token starts in every model's tokenisation at which the likeliest token is the one that comes."
        )
    return lines


def _trainings(evaluation: dict[str, Any], run_folder: Path) -> dict[str, Training]:
    """Return the kind of training of each scored model, where it is known; sources and untouched models have none."""
    known = {name: Training.from_json(value) for name, value in evaluation.get("trainings", {}).items()}
    for name in evaluation.get("domains", {}).get(ALL, {}).get("models", {}):
        if name not in known and (training := training_of(run_folder / name)) is not None:
            known[name] = training
    return known


def _tasks(evaluation: dict[str, Any]) -> list[str]:
    rows = [
        [task, model, metric, f"{value:.4f}"]
        for model, tasks in evaluation.get("tasks", {}).items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]
    return ["## lm-evaluation-harness", "", *_table(["task", "model", "metric", "value"], rows)] if rows else []


def _too_few(num_documents: int) -> str:
    return "" if num_documents >= MIN_DOCUMENTS else f": too few for intervals, which need {MIN_DOCUMENTS}"


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
            "-" if run.clm is None else f"{run.clm:.4f}",
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


def _stages(totals: dict[str, RunSummary]) -> list[str]:
    rows = [
        [
            name,
            stage.name,
            f"{stage.steps:,}",
            f"{stage.tokens:,}",
            f"{stage.windows:,}",
            "-" if stage.clm is None else f"{stage.clm:.4f}",
            "-" if stage.fusion is None else f"{stage.fusion:.4f}",
        ]
        for name, run in totals.items()
        for stage in run.stages
    ]
    head = ["run", "stage", "steps", "tokens", "windows", "CLM", "fusion"]
    return ["## Stages", "", *_table(head, rows)] if rows else []


def _sources(totals: dict[str, RunSummary]) -> list[str]:
    names = sorted({name for run in totals.values() for name in run.source_weights})
    if not names:
        return []
    rows = [
        [name, *(f"{run.source_weights.get(source, 0.0):.3f}" for source in names)]
        for name, run in totals.items()
        if run.source_weights
    ]
    return ["## Weights of the sources", "", *_table(["run", *names], rows), *_mixtures(totals)]


def _mixtures(totals: dict[str, RunSummary]) -> list[str]:
    """Return a table of the windows that some sources scored and others did not; empty where all scored all."""
    rows = [
        [
            name,
            ", ".join(mixture.weights),
            f"{mixture.windows:,}",
            f"{100 * mixture.tokens / run.tokens:.1f} %",
            ", ".join(f"{weight:.3f}" for weight in mixture.weights.values()),
        ]
        for name, run in totals.items()
        for mixture in run.mixtures
        if len(run.mixtures) > 1
    ]
    return ["", *_table(["run", "scored by", "windows", "tokens", "weights"], rows)] if rows else []


def _provenance(summary: dict[str, Any]) -> list[str]:
    facts = []
    if "wall_seconds" in summary:
        facts.append(f"{summary['wall_seconds']:.0f} s in all")
    if summary.get("git_revision"):
        facts.append(f"revision {summary['git_revision']}")
    return [", ".join(facts)] if facts else []


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
