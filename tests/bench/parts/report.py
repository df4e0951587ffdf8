"""The frame of every benchmark: two options, a table for people and a JSON file for everything else.

A benchmark is run as `python -m tests.bench.NAME [--json FILE] [--quick]`. It adds rows as it measures, and one check
for each figure that the documentation names. A check that fails is shown, and nothing more: the exit code stays
0, so that a noisy machine breaks no build.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from services.base.atomic import write_whole

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Check:
    """A named figure, the bound that it should keep, such as "at most 25", and whether it does."""

    name: str
    value: float
    unit: str
    bound: str
    ok: bool


@dataclass(slots=True)
class Report:
    """The result of one benchmark run; rows are dictionaries with the same meaning of a key throughout.

    Rows with the same value under the key `table` are printed as a table of that name.
    """

    name: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def row(self, **cells: Cell) -> None:
        self.rows.append(cells)

    def check(
        self, name: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Add a check of `value` against one bound or both."""
        bounds = [
            f"{word} {bound:g}" for word, bound in (("at least", at_least), ("at most", at_most)) if bound is not None
        ]
        assert bounds, f"{name}: a check needs a bound"
        ok = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        self.checks.append(Check(name, float(value), unit, " and ".join(bounds), bool(ok)))

    def finish(self, json_file: Path | None) -> None:
        """Print the tables and write the file."""
        console = Console(width=None if sys.stdout.isatty() else 160)
        for title in dict.fromkeys(row.get("table") for row in self.rows):
            rows = [row for row in self.rows if row.get("table") == title]
            columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "table"]
            name = f"{self.name}: {title}" if title else self.name
            console.print(_table(name, columns, [[row.get(key) for key in columns] for row in rows]))
        if self.checks:
            cells: list[list[Cell]] = [[c.name, c.value, c.unit, c.bound, c.ok] for c in self.checks]
            console.print(_table("checks", ["name", "value", "unit", "bound", "ok"], cells))
        if json_file is not None:
            content = {
                "name": self.name,
                "machine": machine(),
                "git_revision": git_revision(),
                "rows": self.rows,
                "checks": [asdict(check) for check in self.checks],
            }
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n")
            console.print(f"written to {json_file}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; a benchmark may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller samples")
    return parser


def kept(name: str, file: Path, measure: Callable[[Report], None]) -> Report:
    """Return what a part of a benchmark has measured, now or, where the file is there already, earlier.

    A line on stderr tells when that was at another commit, which the results do not name.
    """
    part = Report(name)
    if file.is_file():
        found = json.loads(file.read_text())
        if (before := found.get("git_revision")) != git_revision():
            print(f"{file}: measured at {before}; remove it to measure again", file=sys.stderr, flush=True)
        part.rows, part.checks = found["rows"], [Check(**check) for check in found["checks"]]
        return part
    started = perf_counter()
    measure(part)
    print(f"{file.stem}: {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    checks = [asdict(check) for check in part.checks]
    content = {"git_revision": git_revision(), "rows": part.rows, "checks": checks}
    write_whole(file, json.dumps(content, indent=1, default=_plain))
    return part


def in_turn(repetitions: int, *sides: Callable[[], object]) -> list[float]:
    """Median CPU seconds of every side, all called once per repetition, so that a ratio comes out of one run.

    CPU time, because figures are per core and other work on the machine must not count; call each side once before,
    where it compiles or fills a cache.
    """
    seconds = np.empty((repetitions, len(sides)))
    for repetition in range(repetitions):
        for side, call in enumerate(sides):
            start = process_time()
            call()
            seconds[repetition, side] = process_time() - start
    return [float(median) for median in np.median(seconds, axis=0)]


def machine() -> dict[str, Cell]:
    """The hardware and versions that speeds depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def git_revision() -> str | None:
    """The commit of the working tree, with "-dirty" when files differ from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _table(title: str, columns: list[str], rows: list[list[Cell]]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        numeric = any(isinstance(row[place], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(_shown, row))
    return table


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool | np.bool_):
        return "yes" if cell else "[bold red]no[/]"
    if isinstance(cell, float | np.floating):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int | np.integer) else cell


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
