"""Checkpoints on a real S3 server with rights on one prefix only, written by Ray's own uploader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.train import Checkpoint
from ray.train._internal.storage import StorageContext

from services.base.files import open_location
from services.jobs.storage import MANIFEST, check_writable, clear, mend_snapshot, newest_complete
from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url

FILES = {f"part-{number}": bytes([number]) * 100_000 for number in range(20)}
FILES |= {f"optimizer-ab/shard-{rank}.safetensors": bytes([rank]) * 100_000 for rank in range(2)}


@pytest.fixture(scope="module")
def location() -> Iterator[str]:
    with (
        pytest.MonkeyPatch.context() as patch,
        s3_server("bucket") as server,
        rights_on_prefix(server, "bucket", "team") as (address, refused),
    ):
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield s3_url(address, "bucket/team/runs/one/checkpoints")
        assert [request for request in refused if "/elsewhere/" not in request] == []


def save(folder: Path, step: int) -> Path:
    """A checkpoint as a trainer leaves it."""
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    manifest = {"step": step, "plan": "plan", "files": {name: len(data) for name, data in FILES.items()}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_checkpoints_are_written_found_read_and_deleted(location: str, tmp_path: Path) -> None:
    check_writable(location)
    assert newest_complete(location) is None
    files, root = open_location(location, "distill.storage")
    above, _, name = root.rpartition("/")
    for step in (3, 5):
        context = StorageContext(
            storage_path=above,
            experiment_dir_name=name,
            storage_filesystem=files,
            trial_dir_name="",
            current_checkpoint_index=step,
        )
        context.persist_current_checkpoint(Checkpoint.from_directory(save(tmp_path / f"step-{step}", step)))
    newest = newest_complete(location)
    assert newest is not None
    assert newest.step == 5
    with newest.local() as folder:
        copied = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in copied} == FILES

    files.delete_file(f"{root}/{newest.name}/part-7")
    listed = {"checkpoint_results": [{"checkpoint_dir_name": newest.name}]}
    with files.open_output_stream(f"{root}/checkpoint_manager_snapshot.json") as stream:
        stream.write(json.dumps(listed).encode())
    whole = mend_snapshot(location)
    assert whole is not None
    assert whole.step == 3
    clear(location)
    assert newest_complete(location) is None


def test_what_must_not_be_written_is_named(location: str) -> None:
    with pytest.raises(ValueError, match=r"^distill\.storage: cannot write to s3://elsewhere/"):
        check_writable(location.replace("bucket/team", "elsewhere/team"))
