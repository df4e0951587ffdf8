"""Read whole documents from files of several formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from services.base.errors import SettingError
from services.base.home import expand_user
from services.corpus.conversations import conversations
from services.corpus.document import Document, domain_of

Format = Literal["text", "jsonl", "parquet", "conversations"]
_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}

_READ_BYTES, _READ_ROWS = 1 << 20, 1024
"""Bytes of a text file, and rows of a Parquet file, that are read at once."""


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
    files: Sequence[Path],
    root: Path,
    *,
    format_: Format | None,
    separator: str | None,
    text_field: str,
    domain_field: str | None,
) -> Iterator[Document]:
    """Yield all documents of the files, in order, named from `root`; ValueError for a file that is not as told.

    Files are read piece by piece: the memory is that of the longest document.
    """
    for path in files:
        kind = format_ or _FORMATS.get(path.suffix)
        name = str(path.relative_to(root))
        if kind is None:
            raise SettingError("files", f"{name} is none of {', '.join(_FORMATS)}; set `format` to say how to read it")
        if kind == "parquet":
            yield from _parquet(path, name, text_field, domain_field)
        elif kind == "conversations":
            yield from conversations(path, name, domain_field)
        elif kind == "jsonl":
            yield from _jsonl(path, name, text_field, domain_field)
        else:
            yield from _text(path, name, separator)


def _checked(text: bytes, path: Path, start_byte: int = 0) -> bytes:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {start_byte + error.start}") from error
    return text


def _text(path: Path, name: str, separator: str | None) -> Iterator[Document]:
    if separator is None:
        yield Document(name, _checked(path.read_bytes(), path))
        return
    for index, (start_byte, piece) in enumerate(_pieces(path, separator.encode())):
        yield Document(f"{name}#{index}", _checked(piece, path, start_byte))


def _pieces(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of a file between separators, each with its offset."""
    start, rest = 0, b""
    with path.open("rb") as file:
        # Reading as much as is left over keeps the time linear where one part is long.
        while more := file.read(max(_READ_BYTES, len(rest))):
            *whole, rest = (rest + more).split(separator)
            for piece in whole:
                yield start, piece
                start += len(piece) + len(separator)
    yield start, rest


def _jsonl(path: Path, name: str, text_field: str, domain_field: str | None) -> Iterator[Document]:
    start_byte = 0
    with path.open("rb") as file:
        for index, line in enumerate(file):
            _checked(line, path, start_byte)
            start_byte += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {index + 1} is not JSON: {error}") from error
            where = f"{path}, line {index + 1}"
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                raise SettingError("text_field", f"{where} has no text under {text_field!r}")
            try:
                text = row[text_field].encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
                place = f"line {index + 1} holds a lone surrogate at character {error.start}"
                raise ValueError(f"{path}: {place}") from error
            yield Document(f"{name}#{index}", text, _domain(row, domain_field, where))


def _parquet(path: Path, name: str, text_field: str, domain_field: str | None) -> Iterator[Document]:
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
    index, read = 0, [text_field, *([domain_field] if domain_field in columns else [])]
    for batch in file.iter_batches(batch_size=_READ_ROWS, columns=read):
        domains = batch.column(domain_field).to_pylist() if domain_field in read else [None] * batch.num_rows
        for value, domain in zip(batch.column(text_field).cast(pa.large_binary()), domains, strict=True):
            if value.is_valid:
                text = _checked(value.as_py(), path)
                yield Document(f"{name}#{index}", text, _domain({domain_field or "": domain}, domain_field, str(path)))
            index += 1


def _domain(row: dict[str, Any], domain_field: str | None, where: str) -> str:
    try:
        return domain_of(row, domain_field)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
