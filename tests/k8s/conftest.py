"""The overlays as kustomize builds them, once for all tests."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.k8s.check.manifests import REPOSITORY, Document, overlay
from tests.k8s.check.schemas import schema_folder

Build = Callable[[str], list[Document]]


@pytest.fixture(scope="session")
def checkable() -> None:
    """Skips where kubectl or the CRDs' schemas are missing, or fails where REQUIRE_TOOLS is set."""
    missing = []
    if shutil.which("kubectl") is None:
        missing.append("kubectl is not on PATH")
    if not schema_folder().is_dir():
        missing.append(f"KubeRay's CRD schemas are not in {schema_folder()}")
    if missing:
        problem = f"{' and '.join(missing)}: the overlays are NOT checked"
        assert not os.environ.get("REQUIRE_TOOLS"), problem
        pytest.skip(problem)


@pytest.fixture(scope="session")
def build(checkable: None) -> Build:
    """Gives a copy of an overlay's documents, to be broken at will."""
    built: dict[str, list[Document]] = {}

    def documents(name: str) -> list[Document]:
        if name not in built:
            built[name] = overlay(name)
        return copy.deepcopy(built[name])

    return documents


@pytest.fixture
def k8s(tmp_path: Path) -> Path:
    """A copy of the k8s folder, to render into."""
    return Path(shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s"))
