"""Alerts fire when they must and not otherwise; dashboards ask for metrics that there are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.check import network
from tests.k8s.check.manifests import matches, of_kind, overlay, pods
from tests.k8s.check.monitoring import dashboards, queries, rules, selectors
from tests.k8s.check.references import selectors_match
from tests.k8s.conftest import Build
from tests.k8s.metric_names import OF_SCRAPING, defined_metrics
from tests.k8s.tools import prometheus_program


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules()))
    return tmp_path / "alerts.yaml"


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    program = prometheus_program("promtool")
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=False)


def test_alert_rules_hold(rule_file: Path) -> None:
    done = promtool("check", "rules", str(rule_file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_and_do_not_fire(rule_file: Path) -> None:
    done = promtool("test", "rules", str(rule_file.with_name("alerts_test.yaml")))
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load(rule_file.with_name("alerts_test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}


def test_queries_read_metrics_that_the_code_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    known = defined_metrics(monkeypatch)
    for where, query in queries():
        found = list(selectors(query))
        assert found, where
        for name, labels in found:
            assert name in known, f"{where}: nothing exports {name}"
            assert labels <= known[name] | OF_SCRAPING, f"{where}: {name} has no {labels - known[name] - OF_SCRAPING}"


def test_a_query_that_is_none_is_noticed() -> None:
    with pytest.raises(ValueError):
        list(selectors("sum by (source (rate(x[5m]))"))
    assert list(selectors("sum by (a) (rate(x{b='c'}[5m])) / y")) == [("x", {"a", "b"}), ("y", set())]


def test_dashboards_are_whole() -> None:
    loaded = dashboards()
    assert set(loaded) == {"sources.json", "stream.json", "distillation.json"}
    assert len({board["uid"] for board in loaded.values()}) == 3
    for name, board in loaded.items():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids), name
        corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
        assert len(corners) == len(ids), name
        assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"])


def test_monitoring_finds_the_pods_and_may_reach_them(build: Build) -> None:
    documents = [*build("gpu"), *overlay("monitoring")]
    assert list(network.problems(documents, ["base", "monitoring"])) == []
    assert list(selectors_match(documents)) == []
    [boards] = [d for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] == "llm-fusion-dashboards"]
    assert set(boards["data"]) == set(dashboards())
    watched = set()
    for monitor in of_kind(documents, "PodMonitor"):
        for pod in pods(documents):
            if matches(monitor["spec"]["selector"], pod.labels):
                watched.add(pod.name)
                declared = {port["name"] for port in pod.spec["containers"][0]["ports"]}
                assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= declared, pod.name
    assert watched == {pod.name for pod in pods(documents) if pod.group in {"head", "worker"}}
