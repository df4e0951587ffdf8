"""Files below a folder or URL, through pyarrow's file systems: written whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from pyarrow import fs

_PARTIAL = ".partial"


class Files:
    """Everything below `root`: a local folder, or a URL such as s3://bucket/folder or memory://folder.

    URLs that pyarrow does not know go to fsspec. Paths are relative to the root, with `/`. Raises ValueError when the
    root cannot be written.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._files, self._folder = _open(root)
        self._renames = isinstance(self._files, fs.LocalFileSystem)
        try:
            self._files.create_dir(self._folder, recursive=True)
            self.write(".writable", b"")
            self.delete(".writable")
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"service.store: cannot write to {root}: {error}") from error

    def place(self, path: str) -> str:
        """How people call the file."""
        return f"{self.root.rstrip('/')}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """The file appears with all its bytes at once; raises OSError when there is no room."""
        full = f"{self._folder}/{path}"
        self._files.create_dir(full.rpartition("/")[0], recursive=True)
        # An object appears when its upload is complete; only a local file could be seen half written.
        target = (
            f"{full}.{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}{_PARTIAL}" if self._renames else full
        )
        try:
            with self._files.open_output_stream(target) as stream:
                stream.write(data)
            if self._renames:
                with Path(target).open("rb") as written:
                    os.fsync(written.fileno())
                Path(target).replace(full)
        except BaseException:
            if self._renames:
                Path(target).unlink(missing_ok=True)
            raise

    def read(self, path: str) -> bytes | None:
        """The file's bytes; None when there is no such file."""
        try:
            with self._files.open_input_stream(f"{self._folder}/{path}") as stream:
                data: bytes = stream.read()
                return data
        except FileNotFoundError:
            return None

    def open(self, path: str) -> Any:
        """The file for random access; raises FileNotFoundError."""
        return self._files.open_input_file(f"{self._folder}/{path}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and sizes in bytes of the files right in a folder; none when there is no such folder."""
        infos = self._infos(folder)
        return {info.base_name: info.size for info in infos if info.type == fs.FileType.File and _whole(info)}

    def folders(self, folder: str) -> list[str]:
        """Names of the folders right in a folder, sorted."""
        return sorted(info.base_name for info in self._infos(folder) if info.type == fs.FileType.Directory)

    def delete(self, path: str) -> None:
        """Nothing happens when there is no such file."""
        try:
            self._files.delete_file(f"{self._folder}/{path}")
        except FileNotFoundError:
            return

    def sweep(self, folder: str) -> None:
        """Deletes what writers on this machine that are no more have left half written."""
        if not self._renames:
            return
        for path in Path(f"{self._folder}/{folder}").glob(f"*.{socket.gethostname()}.*{_PARTIAL}"):
            pid = path.name.split(".")[-3]
            if not (pid.isdigit() and psutil.pid_exists(int(pid))):
                path.unlink(missing_ok=True)

    def _infos(self, folder: str) -> list[Any]:
        selector = fs.FileSelector(f"{self._folder}/{folder}".rstrip("/"), allow_not_found=True)
        infos: list[Any] = self._files.get_file_info(selector)
        return infos


def _whole(info: Any) -> bool:
    return not info.base_name.endswith(_PARTIAL)


def _open(root: str) -> tuple[Any, str]:
    if "://" not in root:
        return fs.LocalFileSystem(), str(Path(root).expanduser().absolute())
    try:
        files, folder = fs.FileSystem.from_uri(root)
    except pa.ArrowInvalid:
        files, folder = _open_fsspec(root)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"service.store: cannot open {root}: {error}") from error
    return files, folder.rstrip("/")


def _open_fsspec(root: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, folder = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError, OSError) as error:
        raise ValueError(f"service.store: cannot open {root}: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(files)), folder
