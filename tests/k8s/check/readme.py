"""The tables of k8s/README.md that the manifests are compared with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.k8s.check.manifests import REPOSITORY

_README = REPOSITORY / "k8s" / "README.md"


@dataclass(frozen=True)
class DrawnEdge:
    """A row of the table `Who may talk to whom`."""

    source: str
    target: str
    ports: tuple[str, ...]
    part: str


def _table(heading: str) -> Iterator[list[str]]:
    """Rows below a heading, without the table's head; raises ValueError when there is none."""
    lines = _README.read_text(encoding="utf-8").splitlines()
    if heading not in lines:
        raise ValueError(f"{_README}: there is no heading {heading!r}")
    rows = []
    for line in lines[lines.index(heading) + 1 :]:
        if line.startswith("#"):
            break
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    yield from rows[2:]


@functools.cache
def drawn_edges() -> tuple[DrawnEdge, ...]:
    return tuple(
        DrawnEdge(source, target, tuple(port.strip() for port in ports.split(",")), part)
        for sources, targets, ports, part, *_ in _table("## Who may talk to whom")
        for source in map(str.strip, sources.split(","))
        for target in map(str.strip, targets.split(","))
    )


@functools.cache
def site_secrets() -> frozenset[str]:
    """Secrets that the site makes, because no secret lies in this repository."""
    return frozenset(row[0].strip("`") for row in _table("## Secrets"))
