"""Pictures of runs: curves over tokens and steps, and held-out scores by domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.evaluation.intervals import MIN_DOCUMENTS

Rows = Sequence[Mapping[str, Any]]

_MARKERS = "osD^vP"
_SMOOTHED = 50
"""A curve of more points than these is drawn as a running mean over a part of them, with the points behind it."""
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


def draw_domains(domains: Mapping[str, Any], pairs: Sequence[tuple[str, str]], path: Path) -> Path | None:
    """Draw by domain a dot per model, and one per pair of a model and its control for their difference.

    Bars around the dots are 95 % intervals, where there are documents enough. The axes begin where the dots do, not at
    zero: what matters is a small part of the whole. None, and no file, without domains.
    """
    if not domains:
        return None
    models = list(next(iter(domains.values()))["models"])
    height = 1.2 + 0.25 * len(domains) * (max(len(models), len(pairs)) + 1)
    with _axes(path, columns=2 if pairs else 1, size=(9.0 if pairs else 7.0, height)) as axes:
        left, *others = axes
        _dots(left, domains, models, lambda result, model: result["models"][model]["nats_per_byte"])
        left.set_xlabel("held-out nats per byte")
        named = {f"{model} minus {control}": (model, control) for model, control in pairs}

        def difference(result: Any, name: str) -> Mapping[str, Any]:
            model, control = named[name]
            found: Mapping[str, Any] = result["models"][model]["difference_from"][control]
            return found

        for right in others:
            _dots(right, domains, list(named), difference)
            right.axvline(0.0, color="black", linewidth=1.0)
            right.set_xlabel("paired difference, better to the left")
            right.set_yticklabels([])
    return path


def _dots(
    axes: Any, domains: Mapping[str, Any], names: Sequence[str], score: Callable[[Any, str], Mapping[str, Any]]
) -> None:
    """Draw a group of rows per domain, with a row per name."""
    rows = len(names) + 1
    for number, name in enumerate(names):
        scores = [score(result, name) for result in domains.values()]
        few = [result["documents"] < MIN_DOCUMENTS for result in domains.values()]
        values = [each["value"] for each in scores]
        below = [0.0 if no else each["value"] - each["low"] for no, each in zip(few, scores, strict=True)]
        above = [0.0 if no else each["high"] - each["value"] for no, each in zip(few, scores, strict=True)]
        at = [-(place * rows + number) for place in range(len(scores))]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.errorbar(values, at, xerr=[below, above], fmt=marker, capsize=3, label=_plain(name))
    middles = [-(place * rows + (len(names) - 1) / 2) for place in range(len(domains))]
    axes.set_yticks(middles, [_plain(name) for name in domains])
    below_axes = -0.6 / axes.figure.get_size_inches()[1]  # inches: room for the axis' name
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, below_axes))


def _plain(name: str) -> str:
    """Return a name in which matplotlib finds no formula."""
    return name.replace("$", r"\$")


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


def draw_specialisation(
    layers: Sequence[int], kinds: Sequence[str], load: Sequence[Sequence[Sequence[float]]], path: Path
) -> Path:
    """Draw the load of every expert by kind of text, a group of rows for each layer; 1 is an even share."""
    rows = [row for of_layer in load for row in of_layer]
    with _axes(path, size=(7.0, 1.5 + 0.25 * len(rows))) as axes:
        axes.grid(visible=False)
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set_yticks(range(len(rows)), [f"{_plain(kind)}, layer {layer}" for layer in layers for kind in kinds])
        axes.set_xlabel("expert")
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
            x, y = [x for x, _ in points], [y for _, y in points]
            if len(points) <= _SMOOTHED:
                axes.plot(x, y, label=name, linewidth=1.5, marker=marker)
                continue
            [drawn_line] = axes.plot(x, _running_mean(y, len(y) // 20), label=name, linewidth=1.5)
            axes.plot(x, y, color=drawn_line.get_color(), linewidth=0.6, alpha=0.25, zorder=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if limits:
            axes.set_ylim(**limits)
        axes.legend()
    return path


def _running_mean(values: Sequence[float], width: int) -> npt.NDArray[np.float64]:
    """Return the means over `width` neighbours around each value, fewer at the ends."""
    ones = np.ones(width)
    sums = np.convolve(values, ones, mode="same")
    return np.asarray(sums / np.convolve(np.ones(len(values)), ones, mode="same"))


@contextmanager
def _axes(path: Path, *, columns: int | None = None, size: tuple[float, float] = (7.0, 4.0)) -> Iterator[Any]:
    """Yield axes of a figure, a list of them for `columns`, and write it to `path`; no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    every = [figure.add_subplot(1, columns or 1, number + 1) for number in range(columns or 1)]
    for axes in every:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    yield every if columns else every[0]
    figure.savefig(path, dpi=120)
