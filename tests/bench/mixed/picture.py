"""Forecast against outcome: a point for each domain and method, with the interval of what training brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def forecast_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a matplotlib figure of the rows of the table `forecast`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    markers = dict(zip(dict.fromkeys(row["domain"] for row in rows), "os^Dv*PX", strict=False))
    colours = {method: f"C{place}" for place, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for row in rows:
        x, y = row["rows_minus_best"], row["training_minus_best"]
        if row["low"] is not None:
            axes.plot([x, x], [row["low"], row["high"]], color=colours[row["method"]], alpha=0.4)
        axes.plot(
            [x], [y], markers[row["domain"]], color=colours[row["method"]], gid=f"{row['domain']}, {row['method']}"
        )
    for domain, marker in markers.items():
        axes.plot([], [], marker, color="black", label=domain)
    for method, colour in colours.items():
        axes.plot([], [], "-", color=colour, label=method)
    axes.set_xlabel("fused rows minus the best source, nats per byte of the train windows")
    axes.set_ylabel("trained on them minus on the best source, held out")
    figure.legend(loc="outside right center", fontsize="small")
    return figure


def draw_forecast(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    forecast_figure(rows).savefig(file, dpi=120)
