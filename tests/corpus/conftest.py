"""Each test of the corpus has a home and a working directory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.models.fetch import fetch


@pytest.fixture(scope="session")
def real_models() -> dict[str, Path]:
    """Folders of two real models, fetched once for all tests: a session's fixtures come before a home of a test's."""
    return {name: fetch(name) for name in ("smollm2-135m-instruct", "gemma-3-270m")}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"
