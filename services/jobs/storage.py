"""Where the checkpoints of a run lie: a local folder, or any URL that pyarrow or fsspec knows.

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

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
_SNAPSHOT = "checkpoint_manager_snapshot.json"


def join_location(location: str | Path, *parts: str) -> str:
    """Folder or URL with `parts` behind its path; what follows a question mark in a URL stays at the end."""
    path, mark, query = str(location).partition("?") if "://" in str(location) else (str(location), "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def split_location(location: str) -> tuple[str, str]:
    """Folder or URL above `location`, and its last part."""
    path, mark, query = location.partition("?") if "://" in location else (location, "", "")
    above, _, name = path.rpartition("/")
    return above + mark + query, name


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A complete checkpoint: `step` and `plan` are those of its position."""

    location: str
    name: str
    step: int
    plan: str

    @contextmanager
    def local(self) -> Iterator[Path]:
        """The checkpoint as a local folder; a copy for as long as it is needed, where it lies elsewhere."""
        files, root = _open(self.location)
        if isinstance(files, LocalFileSystem):
            yield Path(root) / self.name
            return
        with tempfile.TemporaryDirectory(prefix="fusion-checkpoint-") as folder:
            copy_files(f"{root}/{self.name}", folder, source_filesystem=files)
            yield Path(folder)


def newest_complete(location: str | Path) -> StoredCheckpoint | None:
    """The complete checkpoint of the highest step below `location`, or None; ValueError for a location of no kind."""
    files, root = _open(location)
    found = []
    for entry in files.get_file_info(FileSelector(root, allow_not_found=True)):
        if entry.type == FileType.Directory and (manifest := _manifest(files, entry.path)) is not None:
            found.append((manifest["step"], entry.base_name, manifest.get("plan", "")))
    if not found:
        return None
    step, name, plan = max(found)
    return StoredCheckpoint(str(location), name, step, plan)


def mend_snapshot(location: str | Path) -> StoredCheckpoint | None:
    """Makes sure that Ray Train can start in the folder; returns the checkpoint to go on from when Ray knows of none.

    Ray writes the list in place, so that a kill in that moment leaves it unreadable, and it refuses to start with such
    a list, or with one that names a missing folder. The list is then set aside.
    """
    files, root = _open(location)
    snapshot = f"{root}/{_SNAPSHOT}"
    try:
        with files.open_input_stream(snapshot) as stream:
            listed = [entry["checkpoint_dir_name"] for entry in json.loads(stream.read())["checkpoint_results"]]
    except FileNotFoundError:
        return newest_complete(location)
    except (ValueError, KeyError, TypeError):
        listed = None
    if listed:
        folders = files.get_file_info([f"{root}/{name}" for name in listed])
        if all(folder.type == FileType.Directory for folder in folders):
            return None
    newest = newest_complete(location)
    logger.warning("%s is damaged and set aside; going on from %s", snapshot, newest.name if newest else "the start")
    files.move(snapshot, f"{root}/{_SNAPSHOT.removesuffix('.json')}.damaged")
    return newest


def clear(location: str | Path) -> None:
    """Deletes all checkpoints at `location`."""
    files, root = _open(location)
    if files.get_file_info(root).type == FileType.Directory:
        files.delete_dir(root)


def check_writable(location: str | Path) -> None:
    """Raises ValueError unless checkpoints can be written there."""
    files, root = _open(location)
    try:
        files.create_dir(root, recursive=True)
        with files.open_output_stream(f"{root}/.writable") as stream:
            stream.write(b"")
        files.delete_file(f"{root}/.writable")
    except OSError as error:
        raise ValueError(f"distill.storage: cannot write to {location}: {error}") from error


def _open(location: str | Path) -> tuple[FileSystem, str]:
    text = str(location)
    try:
        files, root = FileSystem.from_uri(text if "://" in text else str(Path(text).absolute()))
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"distill.storage: {location} is no folder and no URL that can be opened: {error}") from error
    return files, root.rstrip("/")


def _manifest(files: FileSystem, folder: str) -> dict[str, Any] | None:
    """What `checkpoint.json` says; None where it is missing, or a file that it names is missing or cut off."""
    try:
        with files.open_input_stream(f"{folder}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
        sizes = manifest["files"]
        there = files.get_file_info([f"{folder}/{name}" for name in sizes])
    except (OSError, ValueError, KeyError):
        return None
    return manifest if all(info.size == size for info, size in zip(there, sizes.values(), strict=True)) else None
