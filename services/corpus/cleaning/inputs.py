"""Files that a glob names, on this machine or in an object store, and the bytes in them, decompressed."""

from __future__ import annotations

import heapq
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from services.base.credentials import refuse_credentials, without_credentials
from services.base.errors import SettingError
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
        import fsspec
        import zstandard

        is_zstd = self.name.lower().endswith(".zst")
        try:
            with fsspec.open(self.location, "rb", compression=None if is_zstd else "infer") as stream:
                # fsspec's own reader of .zst ends with the first frame, and knows no lines.
                frames = (
                    zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) if is_zstd else None
                )
                yield stream if frames is None else io.BufferedReader(frames)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise ValueError(f"{without_credentials(self.location)}: cannot be read: {error}") from error


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
    paths = {at: "/" + at.partition("://")[2].lstrip("/") if "://" in at else at for at in found}
    root = os.path.commonpath([str(Path(path).parent) for path in paths.values()])
    return [
        InputFile(location, str(PurePosixPath(paths[location]).relative_to(root)), *found[location])
        for location in sorted(found)
    ]


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
    import fsspec

    refuse_credentials(pattern, key)
    try:
        files, path = fsspec.core.url_to_fs(pattern)
        details = files.glob(path, detail=True)
    except (ImportError, ValueError, OSError) as error:
        raise SettingError(key, f"cannot be listed: {without_credentials(str(error))}") from error
    found = {
        files.unstrip_protocol(name): (int(info["size"] or 0), _version(info))
        for name, info in details.items()
        if info["type"] == "file"
    }
    if not found:
        raise SettingError(key, f"no file matches {pattern!r}")
    return found


def _version(info: dict[str, Any]) -> str:
    known = (info.get(name) for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created"))
    return str(next((value for value in known if value is not None), ""))
