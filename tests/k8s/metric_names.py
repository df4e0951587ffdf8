"""The metrics that the code defines, with their labels: what dashboards and alerts may ask for."""

from __future__ import annotations

import pytest

from services.base import metrics
from services.fusion.metrics import FusionMetrics
from services.fusion.sources.meters import SourceMeter, StoreMetrics
from services.jobs.observer import observer
from services.source.metrics import SourceMetrics

OF_SCRAPING = {"namespace", "pod", "container", "job", "instance", "ray_cluster", "ray_node_type"}
"""Labels that Prometheus adds."""


def defined_metrics(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Name as Prometheus shows it, and its labels."""
    found: dict[str, set[str]] = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description, name
            found[f"ray_{name}"] = set(tag_keys)

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert set(tags) <= found[list(found)[-1]]

    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(metrics, "Gauge", Recorder)
    SourceMetrics("any")
    FusionMetrics()
    StoreMetrics("any")
    SourceMeter("any")
    observer("any")
    return found
