"""The first step: documents of all files, each with its kind and domain; what is no text is dropped with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from services.base.errors import SettingError
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.inputs import InputFile
from services.corpus.cleaning.shards import DROPPED, KEPT, Drop, RawDocument, ShardWriter
from services.corpus.cleaning.tally import Tally

_FORMATS = {
    ".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".html": "html", ".htm": "html", ".xhtml": "html",
}  # fmt: skip
PROGRAMMING = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cu": "cuda", ".cs": "csharp",
    ".go": "go", ".hs": "haskell", ".java": "java", ".jl": "julia", ".js": "javascript", ".jsx": "javascript",
    ".mjs": "javascript", ".kt": "kotlin", ".lua": "lua", ".php": "php", ".pl": "perl", ".proto": "protobuf",
    ".py": "python", ".pyi": "python", ".r": "r", ".rb": "ruby", ".rs": "rust", ".scala": "scala", ".sh": "shell",
    ".sql": "sql", ".swift": "swift", ".ts": "typescript", ".tsx": "typescript",
}  # fmt: skip
"""Programming languages by the ending of a file's name."""
_FIELDS = ("url", "domain", "language", "repository", "path")

Read = tuple[RawDocument, Drop | None]


def format_of(file: InputFile, config: CurateConfig) -> str:
    """Return how a file is read; SettingError when neither its name nor the settings say it."""
    if config.format is not None:
        return config.format
    found = "code" if file.suffix in PROGRAMMING else _FORMATS.get(file.suffix)
    if found is None:
        allowed = ", ".join([*_FORMATS, "source code"])
        raise SettingError("files", f"{file.name} is none of {allowed}; set `format` to say how to read it")
    return found


def read_files(files: Sequence[InputFile], config: CurateConfig) -> Iterator[Read]:
    """Yield the documents of the files in order, those without text with the reason to drop them.

    Raises SettingError or ValueError naming a file that cannot be read at all.
    """
    for file in files:
        kind = format_of(file, config)
        rows = {"jsonl": _jsonl, "parquet": _parquet}.get(kind)
        found = rows(file, config) if rows is not None else _texts(file, config, kind)
        for document, drop in found:
            document.domain = document.domain or _domain(file, rows is not None)
            yield document, drop or _unfit(document)


def read_shard_of_files(shards: Sequence[Sequence[InputFile]], config: CurateConfig, task: int, folder: Path) -> Tally:
    """Write the documents of a task's files to its folder."""
    tally = Tally()
    with ShardWriter(folder / KEPT) as kept, ShardWriter(folder / DROPPED, with_reasons=True) as dropped:
        for document, drop in read_files(shards[task], config):
            if drop is not None:
                document.text = document.text.encode("utf-8", "replace").decode()
            num_bytes = document.num_bytes
            tally.take(num_bytes)
            if drop is None:
                kept.write(document)
                tally.keep(num_bytes)
            else:
                dropped.write(document, drop)
                tally.drop(document, drop, num_bytes)
    return tally


def _unfit(document: RawDocument) -> Drop | None:
    if not document.text.strip():
        return Drop("empty")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Drop("not_utf8", f"lone surrogate at character {error.start}")
    return None


def _domain(file: InputFile, has_rows: bool) -> str:
    """Return the top folder of a file, or the name of a file of many documents."""
    parts = PurePosixPath(file.name).parts
    if len(parts) > 1:
        return parts[0]
    return parts[0].split(".")[0] if has_rows else "documents"


def _texts(file: InputFile, config: CurateConfig, kind: str) -> Iterator[Read]:
    with file.open() as stream:
        data = stream.read()
    whole = RawDocument(file.name, "")
    if kind == "code":
        parts = PurePosixPath(file.name).parts
        whole.kind, whole.language, whole.path = "code", PROGRAMMING.get(file.suffix, ""), "/".join(parts[1:])
        whole.repository = parts[0] if len(parts) > 1 else ""
    try:
        whole.text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        whole.text = data[:4096].decode("utf-8", "replace")
        yield whole, Drop("not_utf8", f"byte {error.start}")
        return
    if kind == "html":
        yield _main_text(whole)
    elif config.separator is None or kind == "code":
        yield whole, None
    else:
        for index, piece in enumerate(whole.text.split(config.separator)):
            yield RawDocument(f"{file.name}#{index}", piece), None


def _main_text(page: RawDocument) -> Read:
    """Return a page reduced to its main text, without navigation and the like."""
    import trafilatura

    found = trafilatura.extract(page.text, favor_precision=True, include_comments=False, deduplicate=False)
    if not found:
        return page, Drop("no_main_text")
    page.text = found
    return page, None


def _jsonl(file: InputFile, config: CurateConfig) -> Iterator[Read]:
    with file.open() as stream:
        for index, line in enumerate(stream):
            if not line.strip():
                continue
            row_id = f"{file.name}#{index}"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
                yield RawDocument(row_id, line.decode("utf-8", "replace")), Drop(reason, str(error))
                continue
            if not isinstance(row, dict) or not isinstance(row.get(config.text_field), str):
                yield RawDocument(row_id, json.dumps(row)), Drop("no_text", f"no text under {config.text_field!r}")
            else:
                yield _document(row, row_id, config), None


def _parquet(file: InputFile, config: CurateConfig) -> Iterator[Read]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open() as stream:
        try:
            table = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file.location}: not a Parquet file: {error}") from error
        names = table.schema_arrow.names
        if config.text_field not in names:
            raise SettingError(
                "text_field", f"{file.name} has no column {config.text_field!r}, only {', '.join(names)}"
            )
        columns = [name for name in (config.text_field, "id", *_FIELDS) if name in names]
        index = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                row_id = f"{file.name}#{index}"
                index += 1
                if isinstance(row[config.text_field], bytes):
                    try:
                        row[config.text_field] = row[config.text_field].decode("utf-8")
                    except UnicodeDecodeError as error:
                        yield RawDocument(row_id, ""), Drop("not_utf8", f"byte {error.start}")
                        continue
                if not isinstance(row[config.text_field], str):
                    yield RawDocument(row_id, ""), Drop("no_text", f"no text under {config.text_field!r}")
                    continue
                yield _document(row, row_id, config), None


def _document(row: dict[str, Any], row_id: str, config: CurateConfig) -> RawDocument:
    own = row.get("id")
    fields = {name: row[name] for name in _FIELDS if isinstance(row.get(name), str)}
    document = RawDocument(str(own) if isinstance(own, str | int) else row_id, row[config.text_field], **fields)
    suffix = PurePosixPath(document.path.lower()).suffix
    if config.format == "code" or suffix in PROGRAMMING:
        document.kind, document.language = "code", PROGRAMMING.get(suffix, document.language)
    for name in ("id", *_FIELDS):
        setattr(document, name, getattr(document, name).encode("utf-8", "replace").decode())
    return document
