"""Pictures of runs: curves over tokens and steps, and held-out scores by domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.evaluation.intervals import MIN_DOCUMENTS

Rows = Sequence[Mapping[str, Any]]

_LABELS = {"clm": "CLM loss, nats per token", "fusion": "fusion loss, nats per token"}


def draw_loss(runs: Mapping[str, Rows], key: str, path: Path) -> Path | None:
    """Draw a line per run over the tokens seen; None, and no file, when no run has the value."""
    lines = {
        name: [(row["total_tokens"], row[key]) for row in rows if row[key] is not None] for name, rows in runs.items()
    }
    return _lines(lines, "tokens", _LABELS[key], path)


def draw_step_values(runs: Mapping[str, Rows], values: Mapping[str, str], label: str, path: Path) -> Path | None:
    """Draw a line per run and value over the steps; `values` maps a metric to its name in the legend."""
    lines = {
        f"{name}: {shown}" if shown else name: [(row["step"], row[key]) for row in rows if row[key] is not None]
        for key, shown in values.items()
        for name, rows in runs.items()
    }
    return _lines(lines, "step", label, path, bottom=0.0)


def draw_domains(domains: Mapping[str, Any], path: Path) -> Path | None:
    """Draw bars of nats per byte with their intervals, a group per domain; see services/evaluation/intervals.py."""
    if not domains:
        return None
    models = list(next(iter(domains.values()))["models"])
    width = 0.8 / len(models)
    with _axes(path) as axes:
        for number, model in enumerate(models):
            scores = [domain["models"][model]["nats_per_byte"] for domain in domains.values()]
            values = [score["value"] for score in scores]
            few = [domain["documents"] < MIN_DOCUMENTS for domain in domains.values()]
            below = [0.0 if no else score["value"] - score["low"] for no, score in zip(few, scores, strict=True)]
            above = [0.0 if no else score["high"] - score["value"] for no, score in zip(few, scores, strict=True)]
            left = [index + (number - (len(models) - 1) / 2) * width for index in range(len(scores))]
            axes.bar(left, values, width, yerr=None if all(few) else [below, above], capsize=3, label=model)
        axes.set_xticks(range(len(domains)), [name.replace("$", r"\$") for name in domains])  # no formulas
        axes.set_ylabel("held-out nats per byte" + ("" if all(few) else ", 95 % interval"))
        axes.legend()
    return path


def draw_evaluations(runs: Mapping[str, Rows], path: Path) -> Path | None:
    """Draw held-out nats per byte over steps; None, and no file, when no run was evaluated while training."""
    lines = {name: [(row["step"], row["nats_per_byte"]) for row in rows] for name, rows in runs.items()}
    return _lines(lines, "step", "held-out nats per byte", path)


def draw_source_weights(runs: Mapping[str, Rows], path: Path) -> Path | None:
    """Draw the share of every source in the mixture over steps; None, and no file, without sources."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run, rows in runs.items():
        for row in rows:
            for source, weight in row["source_weights"].items():
                lines.setdefault(f"{source} ({run})", []).append((row["step"], weight))
    return _lines(lines, "step", "weight of the source", path, bottom=0.0, top=1.0)


def draw_experts(routing: Mapping[str, Any], path: Path) -> Path:
    """Draw the load of every expert of every layer; the colour of 1 is an even share."""
    with _axes(path) as axes:
        axes.grid(visible=False)
        image = axes.imshow(routing["load"], aspect="auto", cmap="viridis", vmin=0.0)
        axes.set_yticks(range(len(routing["layers"])), routing["layers"])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.figure.colorbar(image, label="load, 1 when even")
    return path


def _lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    path: Path,
    **limits: float,
) -> Path | None:
    drawn = {name: points for name, points in lines.items() if points}
    if not drawn:
        return None
    with _axes(path) as axes:
        for name, points in drawn.items():
            marker = "o" if len(points) == 1 else None
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.5, marker=marker)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if limits:
            axes.set_ylim(**limits)
        axes.legend()
    return path


@contextmanager
def _axes(path: Path) -> Iterator[Any]:
    """Yield axes of a figure, and write it to `path`; no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, dpi=120)
