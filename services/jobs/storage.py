"""The checkpoints of a run in a local folder, or at any URL that pyarrow or fsspec knows.

Ray Train uploads a checkpoint file by file and then lists it in a file of its own. A checkpoint counts here once
`checkpoint.json` and all files that it names are there in full length.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from services.base.credentials import without_credentials
from services.base.files import open_location

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
STORAGE_KEY = "distill.storage"
"""The recipe's key for the place of the checkpoints, for messages."""
_SNAPSHOT = "checkpoint_manager_snapshot.json"


def split_location(location: str) -> tuple[str, str]:
    """Return folder or URL above `location`, and its last part."""
    path, mark, query = location.partition("?") if "://" in location else (location, "", "")
    above, _, name = path.rpartition("/")
    return above + mark + query, name


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A complete checkpoint: `step` and `identity` are those of its position."""

    location: str
    name: str
    step: int
    identity: str

    @contextmanager
    def local(self) -> Iterator[Path]:
        """Yield the checkpoint as a local folder; where it lies elsewhere, a copy for as long as it is needed."""
        files, root = _open(self.location)
        if isinstance(files, LocalFileSystem):
            yield Path(root) / self.name
            return
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as folder:
            copy_files(f"{root}/{self.name}", folder, source_filesystem=files)
            yield Path(folder)


def newest_complete(location: str | Path) -> StoredCheckpoint | None:
    """Return the complete checkpoint of the highest step below `location`, None when there is none.

    Raises ValueError for a location that cannot be opened.
    """
    files, root = _open(location)
    found = []
    for entry in files.get_file_info(FileSelector(root, allow_not_found=True)):
        if entry.type == FileType.Directory and isinstance(manifest := _checked_manifest(files, entry.path), dict):
            found.append((manifest["step"], entry.base_name, manifest.get("plan", "")))
    if not found:
        return None
    step, name, identity = max(found)
    return StoredCheckpoint(str(location), name, step, identity)


def mend_snapshot(location: str | Path) -> StoredCheckpoint | None:
    """Make Ray Train start from a whole checkpoint; return the one to resume from when Ray's list has none.

    Ray goes on from the last checkpoint in its list, whatever its state, and refuses to start with a list that names a
    missing folder or that a kill has cut off. Checkpoints that are not whole are taken from the list; a list that
    cannot be read, or has no whole checkpoint, is set aside.
    """
    files, root = _open(location)
    snapshot = f"{root}/{_SNAPSHOT}"
    try:
        with files.open_input_stream(snapshot) as stream:
            listed = json.loads(stream.read())
        names = [entry["checkpoint_dir_name"] for entry in listed["checkpoint_results"]]
    except FileNotFoundError:
        return newest_complete(location)
    except (ValueError, KeyError, TypeError):
        names = []
    whole = set()
    for name in names:
        manifest = _checked_manifest(files, f"{root}/{name}")
        if isinstance(manifest, dict):
            whole.add(name)
        else:
            logger.warning("checkpoint %s in %s is damaged and passed over: %s", name, _shown(location), manifest)
    if whole and len(whole) == len(names):
        return None
    if whole and (mended := _without_damaged(listed, whole)) is not None:
        with files.open_output_stream(snapshot) as stream:
            stream.write(json.dumps(mended).encode())
        return None
    newest = newest_complete(location)
    logger.warning(
        "Ray's list of checkpoints in %s is damaged and set aside; going on from %s",
        _shown(location),
        newest.name if newest else "the start",
    )
    files.move(snapshot, f"{root}/{_SNAPSHOT.removesuffix('.json')}.damaged")
    return newest


def clear(location: str | Path) -> None:
    """Delete all checkpoints at `location`."""
    files, root = _open(location)
    if files.get_file_info(root).type == FileType.Directory:
        files.delete_dir(root)


def check_writable(location: str | Path) -> None:
    """Raise ValueError unless checkpoints can be written there."""
    files, root = _open(location)
    try:
        files.create_dir(root, recursive=True)
        with files.open_output_stream(f"{root}/.writable") as stream:
            stream.write(b"")
        files.delete_file(f"{root}/.writable")
    except (OSError, pa.ArrowException) as error:
        problem = f"{_shown(location)}: {without_credentials(str(error))}"
        raise ValueError(f"{STORAGE_KEY}: cannot write to {problem}") from error


def _open(location: str | Path) -> tuple[FileSystem, str]:
    return open_location(location, STORAGE_KEY)


def _shown(location: str | Path) -> str:
    return without_credentials(str(location))


def _checked_manifest(files: FileSystem, folder: str) -> dict[str, Any] | str:
    """Return the contents of `checkpoint.json`, or in words why the checkpoint is not whole."""
    try:
        with files.open_input_stream(f"{folder}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
        sizes: dict[str, int] = manifest["files"]
        there = files.get_file_info([f"{folder}/{name}" for name in sizes])
        int(manifest["step"])
    except OSError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for info, (name, size) in zip(there, sizes.items(), strict=True):
        if info.type == FileType.NotFound:
            return f"{name} is missing"
        if info.size != size:
            return f"{name} has {info.size} bytes instead of {size}"
    return manifest


def _without_damaged(listed: dict[str, Any], whole: set[str]) -> dict[str, Any] | None:
    """Return Ray's list with the checkpoints in `whole` only; None for a list of an unknown form."""
    try:
        results = zip(listed["checkpoint_results"], listed["checkpoint_report_indices"], strict=True)
        kept = [(result, index) for result, index in results if result["checkpoint_dir_name"] in whole]
        pending = zip(listed["pending_training_results"], listed["pending_validation_specs"], strict=True)
        waiting = [(result, spec) for result, spec in pending if result["checkpoint_dir_name"] in whole]
    except (KeyError, TypeError, ValueError):
        return None
    return listed | {
        "checkpoint_results": [result for result, _ in kept],
        "checkpoint_report_indices": [index for _, index in kept],
        "latest_checkpoint_result": max(kept, key=lambda item: item[1])[0],
        "pending_training_results": [result for result, _ in waiting],
        "pending_validation_specs": [spec for _, spec in waiting],
    }
