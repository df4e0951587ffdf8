"""The folder of fetched models and corpora, and the lock under which one process at a time makes something in it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from services.base.atomic import drop_partial


class FetchError(Exception):
    """A model or corpus cannot be fetched: no room, no registry, wrong checksum. The message is one line."""


def fusion_home() -> Path:
    """Return `$FUSION_HOME`, or `~/.cache/llm-fusion`; ValueError where neither is known."""
    return expand_user(os.environ.get("FUSION_HOME") or "~/.cache/llm-fusion", "FUSION_HOME")


def expand_user(path: str | Path, setting: str) -> Path:
    """Return a path with `~` or `~name` in front replaced by that home directory.

    Raises ValueError naming `setting` when there is no such directory: HOME is not set and the user has no entry in the
    password file, as in a container that runs under an arbitrary user id.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{setting}: nobody knows the home directory of {path}; give a path without ~") from error


def lock_place(location: str) -> Path:
    """Return the path whose lock guards a folder; that of a URL holds on this machine only."""
    if "://" not in location:
        return Path(location)
    return fusion_home() / "locks" / hashlib.sha256(location.encode()).hexdigest()[:16]


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `.NAME.lock` beside `path`: one process at a time makes `path`, the others find it made.

    Partial files of a killed process are deleted first. Raises FetchError when the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        lock.acquire()
    except OSError as error:
        raise FetchError(f"cannot write below {path.parent}: {error.strerror or error}") from error
    try:
        drop_partial(path)
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise FetchError(f"no space left on the disk that holds {path.parent}") from error
        raise
    finally:
        lock.release()
