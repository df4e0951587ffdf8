"""Read whole documents from files of several formats."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from services.base.errors import SettingError
from services.base.home import expand_user
from services.corpus.conversations import conversations
from services.corpus.document import Document

Format = Literal["text", "jsonl", "parquet", "conversations"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


def local_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that the globs name, each once, sorted; relative globs start at the working directory."""
    found: set[Path] = set()
    for index, pattern in enumerate(patterns):
        whole = expand_user(
            pattern, f"files.{index}"
        ).absolute()  # pathlib wants a folder and a relative glob: from the root
        files = {path for path in Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))) if path.is_file()}
        if not files:
            raise SettingError(f"files.{index}", f"no file matches {pattern!r}")
        found |= files
    return sorted(found)


def documents(
    files: Sequence[Path], *, format_: Format | None, separator: str | None, text_field: str
) -> Iterator[Document]:
    """Yield all documents of the files, in order; ValueError for a file that cannot be read as text."""
    root = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        kind = format_ or _FORMATS.get(path.suffix)
        name = str(path.relative_to(root))
        if kind is None:
            raise SettingError("files", f"{name} is none of {', '.join(_FORMATS)}; set `format` to say how to read it")
        if kind == "parquet":
            yield from _parquet(path, name, text_field)
        elif kind == "conversations":
            yield from conversations(path, name)
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
            raise SettingError("text_field", f"{path}, line {index + 1} has no text under {text_field!r}")
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
        raise SettingError("text_field", f"{path} has no text column {text_field!r}; its columns: {', '.join(columns)}")
    index = 0
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0).cast(pa.large_binary()):
            if value.is_valid:
                yield Document(f"{name}#{index}", _checked(value.as_py(), path))
            index += 1
