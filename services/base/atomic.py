"""Files and folders that appear whole or not at all.

Each is made under a partial name beside its place, flushed to the disk and then renamed. A writer that is killed leaves
only the partial name behind, which `sweep_partial` deletes later.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PARTIAL_SUFFIX = ".partial"
ABANDONED_SECONDS = 3600.0
"""Age at which a partial file of a dead process is deleted."""
FOREIGN_SECONDS = 7 * 86_400.0
"""The same where that cannot be known: the process ran on another machine, or its number was given out again."""


def partial_name(name: str) -> str:
    """Return a name of its own for the partial form of `name`: `.NAME.HOST.PID.RANDOM.partial`."""
    return f".{name}.{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a partial path to write to; it becomes `path` at the end, or is deleted when the block raises.

    Missing parent folders are made. A file that is at `path` already is replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path.name))
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file (text as UTF-8) that appears with all its bytes at once; OSError when there is no room."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield an empty partial folder to fill; it becomes `folder` at the end, or is deleted when the block raises.

    Missing parent folders are made. With `replace`, the old contents of `folder` are deleted after the new folder took
    its place; without it, a `folder` that exists and is not empty raises OSError. With `resume`, for the holder of a
    lock, the partial folder has one name, stays when the block raises, and is yielded again the next time.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.resumable" if resume else partial_name(folder.name))
    partial.mkdir(exist_ok=resume)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _flush(path)
        if replace and folder.exists():
            _exchange(partial, folder)
        else:
            partial.rename(folder)
    except BaseException:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def sweep_partial(folder: Path) -> list[Path]:
    """Delete the partial files of killed writers in a folder; return their paths.

    A partial name counts as left behind when its process ran on this machine, has ended, and has written nothing for
    `ABANDONED_SECONDS`. Those of other machines are deleted after a week without a write.
    """
    found = []
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        try:
            if not _abandoned(path):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (OSError, OverflowError):
            continue  # its writer has just finished, or another process sweeps too
        found.append(path)
    return found


def drop_partial(path: Path) -> None:
    """Delete every partial form of a file or folder at once; only for the holder of its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    age = time.time() - max(inner.stat().st_mtime for inner in (path, *path.rglob("*")))
    front, _, pid = path.name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0].rpartition(".")
    ours = front.endswith(f".{socket.gethostname()}") and pid.isdigit()
    return age > (ABANDONED_SECONDS if ours and not psutil.pid_exists(int(pid)) else FOREIGN_SECONDS)


def _exchange(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`, which is deleted; a failure between the two renames puts it back."""
    old = folder.with_name(partial_name(folder.name))
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())
