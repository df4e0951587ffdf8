"""The model that tests of answers ask."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with a chat template and decided opinions: to a random one all tokens are alike."""
    from safetensors.torch import load_file, save_file

    from tests.fakes.answering import make_chat_model

    made = make_chat_model(tmp_path_factory.mktemp("chat") / "tiny")
    weights = load_file(made / "model.safetensors")
    weights["model.norm.weight"] *= 6.0
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(autouse=True)
def _own_canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "home" not in request.fixturenames:
        monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
