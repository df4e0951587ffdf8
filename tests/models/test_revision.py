"""The revision of a model's folder changes with all that decides its numbers, and with nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from services.models.revision import weights_revision


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def test_it_is_the_same_for_the_same_content_wherever_it_lies(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    assert weights_revision(elsewhere) == weights_revision(folder)


def test_stored_windows_of_plain_folders_keep_their_name(folder: Path) -> None:
    """The format of the hash, written out: stores and canaries of older versions name revisions by it."""
    expected = hashlib.sha256()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        content = (folder / name).read_bytes()
        expected.update(f"{name}:{len(content)}:".encode() + hashlib.sha256(content).digest())
    assert weights_revision(folder) == expected.hexdigest()[:32]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
        "layers/attention.py",
        "quantize_config.json",
        "hf_quant_config.json",
        "params.json",
        "pytorch_model.bin",
    ],
)
def test_what_decides_the_numbers_decides_the_revision(folder: Path, name: str) -> None:
    before = weights_revision(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("first")
    first = weights_revision(folder)
    (folder / name).write_text("other")
    assert len({before, first, weights_revision(folder)}) == 3


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "chat_template.jinja", "tokenizer.json"])
def test_what_does_not_is_left_out(folder: Path, name: str) -> None:
    before = weights_revision(folder)
    (folder / name).write_text("other")
    assert weights_revision(folder) == before
