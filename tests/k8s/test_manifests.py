"""The shipped overlays hold, and every rule that says so catches its breach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.k8s.breaches import BREACHES, find
from tests.k8s.check import network, schemas
from tests.k8s.check.manifests import MissingToolError
from tests.k8s.check.run import PARTS, RECIPES, problems, stale_files
from tests.k8s.conftest import Build


@pytest.mark.parametrize("name", PARTS)
def test_an_overlay_has_no_problems(build: Build, name: str) -> None:
    assert list(problems(build(name), PARTS[name])) == []


@pytest.mark.parametrize("name", RECIPES)
def test_rendered_folders_are_current(name: str) -> None:
    assert stale_files(name) == [], "`make k8s-render` makes them anew"


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_caught(build: Build, breach: str) -> None:
    change, message = BREACHES[breach]
    documents = build("production")
    change(documents)
    found = list(problems(documents, PARTS["production"]))
    assert any(message in problem for problem in found), found


def test_the_schemas_can_be_elsewhere_and_their_absence_is_an_error(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBERAY_SCHEMAS", str(tmp_path))
    documents = build("cpu-dev")
    find(documents, "RayService", "fusion")["metadata"]["labels"]["seen"] = "never"
    with pytest.raises(MissingToolError, match="--schemas"):
        list(schemas.problems(documents))


def test_defaults_are_applied_as_the_api_server_does() -> None:
    document: dict[str, Any] = {"a": [{}, {"n": 2}]}
    items = {"properties": {"n": {"default": 1}, "m": {}}}
    schemas.apply_defaults({"properties": {"a": {"items": items}, "b": {"default": {"x": 1}}}}, document)
    assert document == {"a": [{"n": 1}, {"n": 2}], "b": {"x": 1}}


def test_every_part_of_the_table_is_in_some_overlay() -> None:
    drawn = {edge.part for edge in network.drawn_edges()}
    assert drawn == {part for parts in PARTS.values() for part in parts} | {
        "autoscaling",
        "monitoring",
        "object-store",
        "openshift",
        "reward",
    }
