"""PromQL in dashboards and alert rules: what it asks for, and whether it can be parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.k8s.check.manifests import REPOSITORY

FOLDER = REPOSITORY / "k8s" / "overlays" / "monitoring"


def dashboards() -> dict[str, dict[str, Any]]:
    """Dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((FOLDER / "dashboards").glob("*.json"))}


def rules() -> dict[str, Any]:
    """The alert rules in Prometheus' own form."""
    spec: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]
    return spec


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query with Grafana's variables filled in."""
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}, {panel['title']}", re.sub(r"\$\w+", ".*", target["expr"])
    for group in rules()["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics that a query reads, with the labels that it selects or groups by; ValueError when it is not PromQL."""
    yield from _walk(promql_parser.parse(query), set())


def _walk(node: Any, grouped: set[str]) -> Iterator[tuple[str, set[str]]]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, grouped | {matcher.name for matcher in node.matchers.matchers}
    elif isinstance(node, promql_parser.AggregateExpr):
        labels = set(node.modifier.labels) if node.modifier is not None else set()
        yield from _walk(node.expr, grouped | labels)
    else:
        for name in ("expr", "lhs", "rhs", "vector_selector"):
            inner = getattr(node, name, None)
            if inner is not None:
                yield from _walk(inner, grouped)
        for argument in getattr(node, "args", None) or ():
            yield from _walk(argument, grouped)
