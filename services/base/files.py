"""Files below a folder or URL, through pyarrow's and fsspec's file systems: written whole or not at all."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from services.base.atomic import FOREIGN_SECONDS, PARTIAL_SUFFIX, partial_name, sweep_partial, write_whole
from services.base.credentials import without_credentials
from services.base.home import expand_user
from services.base.object_store import PROTOCOLS, without_folders

_PIECE_BYTES = 1 << 23
"""Bytes that are held in memory while a file is uploaded."""


def open_location(location: str | Path, setting: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a folder or URL, and the path there without a slash at its end.

    URLs that pyarrow does not know go to fsspec. Object stores make no folders, so that rights on a prefix are enough.
    Raises ValueError naming `setting` when neither can open it.
    """
    text = str(location)
    if "://" not in text:
        return fs.LocalFileSystem(), str(expand_user(text, setting).absolute())
    try:
        try:
            files, folder = fs.FileSystem.from_uri(text)
        except pa.ArrowInvalid:
            files, folder = _open_fsspec(text)
    except (ValueError, ImportError, OSError, pa.ArrowException) as error:
        problem = f"{without_credentials(text)}: {without_credentials(str(error))}"
        raise ValueError(f"{setting}: cannot open {problem}") from error
    if text.partition("://")[0] in PROTOCOLS:
        files = without_folders(files)
    return files, folder.rstrip("/")


def join_location(location: str | Path, *parts: str) -> str:
    """Return the folder or URL with `parts` behind its path; what follows a question mark in a URL stays at the end."""
    path, mark, query = str(location).partition("?") if "://" in str(location) else (str(location), "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


class Files:
    """The files below `root`: a local folder, or a URL such as s3://bucket/folder or memory://folder.

    Paths are relative to the root, with `/`. Raises ValueError naming `setting` when the root cannot be written, which
    is not tried with `read_only`.
    """

    def __init__(self, root: str, setting: str = "service.store", *, read_only: bool = False) -> None:
        self.root = root
        self._files, self._folder = open_location(root, setting)
        self._local = isinstance(self._files, fs.LocalFileSystem)
        self._has_folders = root.partition("://")[0] not in PROTOCOLS
        if read_only:
            return
        try:
            self.write(".writable", b"")
            self.delete(".writable")
        except (OSError, pa.ArrowException) as error:
            problem = f"{without_credentials(root)}: {without_credentials(str(error))}"
            raise ValueError(f"{setting}: cannot write to {problem}") from error

    @property
    def local_folder(self) -> Path | None:
        """The root as a folder of this machine; None for a URL of another kind."""
        return Path(self._folder) if self._local else None

    def location(self, path: str) -> str:
        """Return the full path or URL of a file, for messages."""
        return without_credentials(join_location(self.root, path))

    def write(self, path: str, data: bytes) -> None:
        """Write a file that appears with all its bytes at once; OSError when there is no room."""
        full = f"{self._folder}/{path}"
        if self._local:
            write_whole(Path(full), data)
        elif not self._has_folders:
            self._upload(full, data)
        else:
            folder, _, name = full.rpartition("/")
            self._files.create_dir(folder, recursive=True)
            partial = f"{folder}/{partial_name(name)}"
            try:
                self._upload(partial, data)
                self._files.move(partial, full)
            except BaseException:
                self._delete(partial)
                raise

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None when there is no such file."""
        try:
            with self._files.open_input_stream(f"{self._folder}/{path}") as stream:
                data: bytes = stream.read()
                return data
        except FileNotFoundError:
            return None

    def upload(self, path: str, file: Path) -> None:
        """Copy a local file to `path`, piece by piece; a reader may find a part of it until this returns."""
        full = f"{self._folder}/{path}"
        if self._has_folders:
            self._files.create_dir(full.rpartition("/")[0], recursive=True)
        with file.open("rb") as source, self._files.open_output_stream(full) as stream:
            shutil.copyfileobj(source, stream, _PIECE_BYTES)

    def copy(self, path: str, other: str) -> None:
        """Copy a file to another path below the root; a reader may find a part of it until this returns."""
        full = f"{self._folder}/{other}"
        if self._has_folders:
            self._files.create_dir(full.rpartition("/")[0], recursive=True)
        self._files.copy_file(f"{self._folder}/{path}", full)

    def delete_all(self, folder: str) -> None:
        """Delete a folder with all that is below it, if it is there."""
        full = f"{self._folder}/{folder}"
        if self._files.get_file_info(full).type == fs.FileType.Directory:
            self._files.delete_dir(full)

    def open(self, path: str) -> Any:
        """Open a file for random access; FileNotFoundError when there is none."""
        return self._files.open_input_file(f"{self._folder}/{path}")

    def sizes(self, folder: str) -> dict[str, int]:
        """Return names and sizes in bytes of the files directly in a folder; none when there is no such folder."""
        infos = self._infos(folder)
        return {info.base_name: info.size for info in infos if info.type == fs.FileType.File and _whole(info)}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, sorted."""
        return sorted(info.base_name for info in self._infos(folder) if info.type == fs.FileType.Directory)

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        self._delete(f"{self._folder}/{path}")

    def sweep(self, folder: str) -> None:
        """Delete the partial files of killed writers in a folder, as `sweep_partial` does."""
        if self._local:
            sweep_partial(Path(f"{self._folder}/{folder}"))
        elif self._has_folders:
            for info in self._infos(folder):
                if not _whole(info) and info.mtime and time.time() - info.mtime.timestamp() > FOREIGN_SECONDS:
                    self._delete(info.path)

    def _upload(self, full: str, data: bytes) -> None:
        with self._files.open_output_stream(full) as stream:
            stream.write(data)

    def _delete(self, full: str) -> None:
        try:
            self._files.delete_file(full)
        except FileNotFoundError:
            return

    def _infos(self, folder: str) -> list[Any]:
        selector = fs.FileSelector(f"{self._folder}/{folder}".rstrip("/"), allow_not_found=True)
        try:
            infos: list[Any] = self._files.get_file_info(selector)
        except FileNotFoundError:  # in spite of `allow_not_found`, when the folder appears between Arrow's two looks
            infos = self._files.get_file_info(selector)
        return infos


def _whole(info: Any) -> bool:
    return not info.base_name.endswith(PARTIAL_SUFFIX)


def _open_fsspec(url: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    files, folder = fsspec.core.url_to_fs(url)
    if isinstance(files, LocalFileSystem):
        return fs.LocalFileSystem(), folder
    return fs.PyFileSystem(fs.FSSpecHandler(files)), folder
