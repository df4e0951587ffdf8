"""`posttrain.md` and `posttrain.html`: for every stage the figures before and after, the guards, and ten answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.base.atomic import write_whole
from services.evaluation.report.html_page import write_page
from services.jobs.step_log import read_rows
from services.posttrain.data.manifest import StageData
from services.posttrain.gate import Decision, Line

_SHOWN = 400
"""Number of characters of a prompt or an answer that are shown."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """A stage that was trained and judged."""

    name: str
    kind: str
    folder: Path
    start: Path
    data: StageData
    decision: Decision


def write_report(folder: Path, results: Sequence[StageResult]) -> None:
    """Write both files into the chain's folder."""
    text = (
        "\n".join(["# Post-training", "", *_overview(results), *(line for r in results for line in _stage(r))]) + "\n"
    )
    write_whole(folder / "posttrain.md", text)
    write_page(text, "Post-training", folder / "posttrain.html")


def _overview(results: Sequence[StageResult]) -> Iterator[str]:
    yield "| stage | gate | metric | before | after | difference (95 %) |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        metric = result.decision.lines[0]
        cells = (result.name, _verdict(result.decision), metric.name, *_figures(metric))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _verdict(decision: Decision) -> str:
    if decision.promoted:
        return "promoted"
    why = ", ".join(decision.failed)
    return f"**promoted by force** in spite of {why}" if decision.forced else f"**held back** by {why}"


def _figures(line: Line) -> tuple[str, str, str]:
    difference = line.difference
    ends = "" if difference.low is None else f" ({difference.low:+.4f} to {difference.high:+.4f})"
    return f"{line.before:.4f}", f"{line.after:.4f}", f"{difference.value:+.4f}{ends}"


def _stage(result: StageResult) -> Iterator[str]:
    decision, data = result.decision, result.data
    origins = ", ".join(f"{name}: {count}" for name, count in sorted(data.counts.items()))
    yield f"## {result.name}"
    yield ""
    yield f"{_verdict(decision)}. Started from `{result.start}`. {len(data.rows)} rows ({origins});"
    yield f"{data.held_out} more were left out because they hold a held-out prompt."
    yield ""
    steps = read_rows(result.folder / "metrics.jsonl")
    if steps:
        first, last = steps[0], steps[-1]
        yield f"{last['step']} steps, loss {first['loss']:.4f} in the first and {last['loss']:.4f} in the last."
        yield ""
    yield "| figure | role | before | after | difference (95 %) | |"
    yield "|---|---|---|---|---|---|"
    for line in decision.lines:
        role, verdict = "metric" if line.is_metric else "guard", "good" if line.ok else "**not good**"
        yield f"| {line.name} | {role} | {' | '.join(_figures(line))} | {verdict} |"
    yield ""
    yield "| prompt | before | after | score |"
    yield "|---|---|---|---|"
    for example in decision.examples:
        cells = [_cell(example[key]) for key in ("prompt", "before", "after")]
        yield f"| {' | '.join(cells)} | {example['score_before']:.2f} to {example['score_after']:.2f} |"
    yield ""


def _cell(text: str) -> str:
    """Return a text for a cell of a table, as code: what a model wrote must not be read as Markdown."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
    shown = " ".join(shown.split()).replace("|", "\\|").replace("`", "'")
    return f"`{shown}`" if shown else "(empty)"
