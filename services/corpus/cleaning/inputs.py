"""Files that a glob names, on this machine or in an object store, and the bytes in them, decompressed."""

from __future__ import annotations

import bz2
import gzip
import heapq
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pyarrow import fs

from services.base.credentials import refuse_credentials, without_credentials
from services.base.errors import SettingError
from services.base.files import open_location
from services.corpus.readers import local_files

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read.

    Attributes:
        location: absolute path, or URL.
        name: path below the folder that all files share.
        version: changes when the file does: time of the last change, or what an object store has for it.
    """

    location: str
    name: str
    num_bytes: int
    version: str

    @property
    def suffix(self) -> str:
        """The ending that says what is in the file, in lower case; that of a compression is left out."""
        path = PurePosixPath(self.name.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix

    def identity(self) -> list[Any]:
        return [self.location, self.num_bytes, self.version]

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, decompressed; ValueError that names it when it cannot be read."""
        import zstandard

        files, path = open_location(self.location, "files")
        try:
            with files.open_input_file(path) as stream:
                yield self._decompressed(stream)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise ValueError(f"{without_credentials(self.location)}: cannot be read: {error}") from error

    def _decompressed(self, stream: Any) -> Any:
        import zstandard

        suffix = PurePosixPath(self.name.lower()).suffix
        if suffix == ".zst":
            frames = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
            return io.BufferedReader(frames)
        openers: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        return openers.get(suffix, io.BufferedReader)(stream)  # pyarrow's own stream knows no lines


def input_files(patterns: Sequence[str], setting: str = "files") -> list[InputFile]:
    """Return the files that the globs name, each once, sorted; SettingError for a glob without any."""
    found: dict[str, tuple[int, str]] = {}
    for index, pattern in enumerate(patterns):
        key = f"{setting}.{index}"
        if "://" in pattern:
            found |= _remote_files(pattern, key)
            continue
        try:
            files = local_files([pattern])
        except SettingError as error:
            raise SettingError(key, error.problem) from error
        for path in files:
            stat = path.stat()
            found[str(path)] = stat.st_size, str(stat.st_mtime_ns)
    paths = {at: _path_of(at) for at in found}
    root = os.path.commonpath([str(Path(path).parent) for path in paths.values()])
    return [
        InputFile(location, str(PurePosixPath(paths[location]).relative_to(root)), *found[location])
        for location in sorted(found)
    ]


def _path_of(location: str) -> str:
    """Return the path in a URL, from its root; a local path as it is."""
    if "://" not in location:
        return location
    return "/" + location.partition("://")[2].partition("?")[0].lstrip("/")


def deal(files: Sequence[InputFile], num_shards: int) -> list[list[InputFile]]:
    """Return the files of every shard, about equally many bytes in each; the same files give the same shards."""
    shards: list[list[InputFile]] = [[] for _ in range(num_shards)]
    loads = [(0, shard) for shard in range(num_shards)]
    for file in sorted(files, key=lambda file: (-file.num_bytes, file.location)):
        load, shard = heapq.heappop(loads)
        shards[shard].append(file)
        heapq.heappush(loads, (load + file.num_bytes + 1, shard))
    return [sorted(shard, key=lambda file: file.location) for shard in shards]


def _remote_files(pattern: str, key: str) -> dict[str, tuple[int, str]]:
    """Return size and version of the files that a URL with `*` or `**` names; what follows a `?` belongs to the URL."""
    from fsspec.utils import glob_translate

    refuse_credentials(pattern, key)
    path, mark, query = pattern.partition("?")
    fixed = re.split(r"[*\[]", path, maxsplit=1)[0].rpartition("/")[0]
    files, folder = open_location(fixed + mark + query, key)
    matches = re.compile(glob_translate(folder + path[len(fixed) :])).match
    try:
        infos = files.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    except OSError as error:
        raise SettingError(key, f"cannot be listed: {without_credentials(str(error))}") from error
    found = {
        fixed + info.path[len(folder) :] + mark + query: (int(info.size or 0), str(info.mtime_ns))
        for info in infos
        if info.type == fs.FileType.File and matches(info.path)
    }
    if not found:
        raise SettingError(key, f"no file matches {without_credentials(pattern)!r}")
    return found
