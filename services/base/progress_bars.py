"""Show progress as bars on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

_LINE_SECONDS = 10.0


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints texts of users and models unchanged: no markup, no emoji codes, no colouring."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


@contextmanager
def model_progress(console: Console, name: str) -> Iterator[Callable[[str, float], None]]:
    """Report the step that a model's fetching has reached, and the share that is done."""
    if not console.is_terminal:
        last = ""

        def line(step: str, share: float) -> None:
            nonlocal last
            if step != last:
                console.print(f"{name}: {step}")
                last = step

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        yield lambda step, share: progress.update(task, description=f"{name}: {step}", completed=share)


@contextmanager
def deployment_progress(console: Console) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Report the state of every application while it starts."""
    started = time.monotonic()
    last: dict[str, str] = {}
    last_line = started

    def text(states: Mapping[str, str]) -> str:
        return "  ".join(f"{name}: {state.lower()}" for name, state in states.items())

    if console.is_terminal:
        with console.status("starting Ray") as status:
            yield lambda states: status.update(Text(text(states)))
        return

    def line(states: Mapping[str, str]) -> None:
        nonlocal last, last_line
        now = time.monotonic()
        if states != last or now - last_line > _LINE_SECONDS:
            console.print(f"{now - started:4.0f} s  {text(states)}")
            last, last_line = dict(states), now

    yield line


@contextmanager
def window_progress(console: Console, unit: str = "windows") -> Iterator[Callable[[str, int, int], None]]:
    """Report the number of windows that are done, and of all windows, by name."""
    if not console.is_terminal:
        last: dict[str, float] = {}

        def line(name: str, done: int, total: int) -> None:
            now = time.monotonic()
            if done == total or now - last.get(name, float("-inf")) > _LINE_SECONDS:
                console.print(f"{name}: {done:,} of {total:,} {unit}")
                last[name] = now

        yield line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def bar(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name)
            progress.update(tasks[name], completed=done, total=total)

        yield bar
