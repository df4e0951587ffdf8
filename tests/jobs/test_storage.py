"""Checkpoints in a folder or behind a URL: what is whole is used, what is not is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from services.base.files import open_location
from services.jobs.storage import check_writable, clear, mend_snapshot, newest_complete

SNAPSHOT = "checkpoint_manager_snapshot.json"


def make_checkpoint(location: str, step: int) -> None:
    files, root = open_location(location, "distill.storage")
    content = {"model.safetensors": b"w" * 100, "trainer_state.pt": b"s" * 50}
    files.create_dir(f"{root}/step-{step}", recursive=True)
    sizes = {name: len(data) for name, data in content.items()}
    manifest = json.dumps({"step": step, "plan": "p", "files": sizes}).encode()
    for name, data in {**content, "checkpoint.json": manifest}.items():
        with files.open_output_stream(f"{root}/step-{step}/{name}") as stream:
            stream.write(data)


def ray_list(*steps: int) -> str:
    """Ray's own list of checkpoints, written by its own class."""
    results = [{"checkpoint_dir_name": f"step-{step}", "metrics": {"step": step}} for step in steps]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(steps))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(steps),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return state.model_dump_json()


def cut_off(folder: Path) -> None:
    (folder / "trainer_state.pt").write_bytes(b"s" * 20)


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")


def incomplete(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "trainer_state.pt has 20 bytes instead of 50"),
        (emptied, "checkpoint.json cannot be read"),
        (incomplete, "model.safetensors is missing"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage, reason):
    for step in (3, 5):
        make_checkpoint(str(tmp_path), step)
    (tmp_path / SNAPSHOT).write_text(ray_list(3, 5))
    damage(tmp_path / "step-5")
    with caplog.at_level(logging.WARNING):
        assert mend_snapshot(tmp_path) is None, "Ray starts from its own list"
    assert f"checkpoint step-5 in {tmp_path} is damaged and passed over: {reason}" in caplog.text
    mended = _CheckpointManagerState.model_validate_json((tmp_path / SNAPSHOT).read_text())
    assert mended.latest_checkpoint_result is not None
    assert mended.latest_checkpoint_result.checkpoint_dir_name == "step-3"
    assert [result.checkpoint_dir_name for result in mended.checkpoint_results] == ["step-3"]
    assert mended.checkpoint_report_indices == [0]
    newest = newest_complete(tmp_path)
    assert newest is not None and newest.name == "step-3"


def test_a_list_of_damaged_checkpoints_only_is_set_aside(tmp_path):
    for step in (3, 5):
        make_checkpoint(str(tmp_path), step)
    (tmp_path / SNAPSHOT).write_text(ray_list(5))
    cut_off(tmp_path / "step-5")
    newest = mend_snapshot(tmp_path)
    assert newest is not None and newest.name == "step-3"
    assert not (tmp_path / SNAPSHOT).exists()
    assert mend_snapshot(tmp_path) == newest


def test_a_whole_list_is_left_as_it_is(tmp_path):
    for step in (3, 5):
        make_checkpoint(str(tmp_path), step)
    (tmp_path / SNAPSHOT).write_text(ray_list(3, 5))
    before = (tmp_path / SNAPSHOT).read_bytes()
    assert mend_snapshot(tmp_path) is None
    assert (tmp_path / SNAPSHOT).read_bytes() == before


@pytest.mark.parametrize("url", ["{folder}", "file://{folder}", "local://{folder}", "memory://{folder}"])
def test_any_protocol_of_pyarrow_or_fsspec_holds_checkpoints(tmp_path, url):
    location = f"{url.format(folder=tmp_path)}/toy/run/checkpoints"
    check_writable(location)
    assert newest_complete(location) is None
    for step in (3, 12):
        make_checkpoint(location, step)
    newest = newest_complete(location)
    assert newest is not None and (newest.name, newest.step) == ("step-12", 12)
    with newest.local() as folder:
        assert (folder / "trainer_state.pt").read_bytes() == b"s" * 50
    clear(location)
    assert newest_complete(location) is None


def test_a_place_that_cannot_be_opened_or_written_names_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"distill\.storage: cannot open nothing-like-that"):
        newest_complete("nothing-like-that://x/y")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"distill\.storage: cannot write to"):
        check_writable(tmp_path / "file" / "checkpoints")
