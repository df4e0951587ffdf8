"""The tables of `fusion headroom`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from services.evaluation.headroom.forecast import source_model
from services.evaluation.intervals import ALL


def show_headroom(found: dict[str, Any], console: Console) -> None:
    """Print nats per byte by domain and model, then the sources' part in them, what k cuts off, and the cost."""
    console.print(_scores(found))
    console.print(_sources(found))
    console.print(_cut_off(found))
    for name, cost in found["cost"].items():
        console.print(
            f"source {name}: {cost['seconds_per_megabyte']:.1f} s per MB, {cost['train_seconds'] / 3600:.2f} h for the "
            f"split train ({cost['basis']})"
        )
    if untimed := [name for name in found["sources"] if name not in found["cost"]]:
        console.print(f"not timed, as they do not answer: {', '.join(untimed)}")
    everything = found["domains"][ALL]
    console.print(f"{everything['bytes']:,} bytes of {found['windows']} windows in {everything['documents']} documents")
    prior = ", ".join(f"{name}: {weight}" for name, weight in found["prior"].items())
    console.print(f"for strategy online: fusion: {{strategy: online, prior: {{{prior}}}}}", soft_wrap=True)
    for name, number in found["left_out"].items():
        console.print(f"{name}: does not take {number} windows, or not byte for byte; left out for all")


def _scores(found: dict[str, Any]) -> Table:
    title = f"{found['corpus']}/{found['split']}"
    table = Table("domain", "model", "nats per byte", "less than the best source", title=title, title_justify="left")
    for domain, result in found["domains"].items():
        models = result["models"]
        best = min(
            map(source_model, found["sources"]),
            key=lambda name: models[name]["nats_per_byte"]["value"],
        )
        for name, values in sorted(models.items(), key=lambda item: item[1]["nats_per_byte"]["value"]):
            difference = "best source" if name == best else _less(values["difference_from"][best])
            table.add_row(domain, name, f"{values['nats_per_byte']['value']:.4f}", difference)
        table.add_section()
    return table


def _less(difference: dict[str, Any]) -> str:
    """Return how much less is lost than by another model, with its interval."""
    if difference["low"] is None:
        return f"{-difference['value']:+.4f}"
    return f"{-difference['value']:+.4f} ({-difference['high']:+.4f} to {-difference['low']:+.4f})"


def _sources(found: dict[str, Any]) -> Table:
    table = Table("domain", "source", "weight", "weight in the best mixture", "best at", "needed", "disagree", "masked")
    for domain, result in found["domains"].items():
        for place, name in enumerate(found["sources"]):
            of_domain = (f"{result['disagree']:.1%}", f"{result['masked']:.1%}") if place == 0 else ("", "")
            table.add_row(
                domain,
                name,
                f"{result['weights'][name]:.2f}",
                f"{result['mixture']['weights'][name]:.2f}",
                f"{result['best_at'][name]:.1%}",
                "no" if name in result["leave_out"] else "yes",
                *of_domain,
            )
        table.add_section()
    return table


def _cut_off(found: dict[str, Any]) -> Table:
    sizes = sorted({size for outside in found["outside_k"].values() for size in outside})
    table = Table("mass outside", *(f"k = {size}" for size in sizes))
    for name, outside in found["outside_k"].items():
        table.add_row(name, *(f"{outside[size]:.1%}" if size in outside else "" for size in sizes))
    return table
