"""The overlays as kustomize builds them, once for all tests."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable

import pytest

from tests.k8s.check.manifests import Document, overlay

Build = Callable[[str], list[Document]]


@pytest.fixture(scope="session")
def build() -> Build:
    """Gives a copy of an overlay's documents, to be broken at will."""
    if shutil.which("kubectl") is None:
        assert not os.environ.get("REQUIRE_TOOLS"), "REQUIRE_TOOLS is set, and kubectl is missing"
        pytest.skip("kubectl is not on PATH: the overlays are NOT checked")
    built: dict[str, list[Document]] = {}

    def documents(name: str) -> list[Document]:
        if name not in built:
            built[name] = overlay(name)
        return copy.deepcopy(built[name])

    return documents
