"""A corpus: documents split once into train and held-out windows, kept in a ledger that every part reads.

On disk: `windows.parquet`, one row per window in the order of the documents, and `corpus.json` with counts, origin and
fingerprints. The windows of a document follow each other and together are the document, byte for byte (only the last
document under a cap may end early). Preparing holds the text of the corpus in memory once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from services.common.corpus_origin import Document, Format, PackageOrigin, documents, local_files, package_files
from services.common.corpus_windows import cut, sharing
from services.common.home import exclusive
from services.common.packages import file_sha256
from services.common.passage import Passage
from services.common.settings import Settings

TRAIN, HELD_OUT = "train", "held_out"
_WINDOWS, _RECORD = "windows.parquet", "corpus.json"
_VERSION = 1
_log = logging.getLogger(__name__)


class CorpusConfig(Settings):
    """What text, and how it is split. Exactly one of `files` and `package` says where it comes from.

    files: globs of .txt, .md, .rst, .jsonl or .parquet files (others with `format`), from the working directory.
    separator: what lies between documents in a text file; without it a file is one document.
    text_field: key (.jsonl) or column (.parquet) that holds the text.
    held_out_share: share of the bytes whose documents are held out; `seed` draws them.
    train_bytes, held_out_bytes: use at most so much of a split.
    shared_run_bytes: a train document is dropped when it has so long a run of text in common with a held-out one;
        null switches that off. Exact duplicates are dropped always.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "corpus"
    files: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    package: PackageOrigin | None = None
    format: Format | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    text_field: str = "text"
    window_bytes: Annotated[int, Field(ge=16, le=2**20)] = 1024
    train_bytes: Annotated[int, Field(ge=1)] | None = None
    held_out_bytes: Annotated[int, Field(ge=1)] | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    shared_run_bytes: Annotated[int, Field(ge=16)] | None = 100
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.files is None) == (self.package is None):
            raise ValueError("give exactly one of `files` and `package`")
        return self


@dataclass(frozen=True, slots=True)
class Window:
    """A window: its bytes, the document it comes from, its place there, and its place in the split."""

    text: bytes
    document: str
    start_byte: int
    index: int

    @property
    def passage(self) -> Passage:
        """What sources are asked to score, and what its scores are stored under."""
        return Passage(self.text)


class Corpus:
    """The ledger of a prepared corpus, held in memory."""

    def __init__(self, folder: Path, record: dict[str, Any], table: pa.Table) -> None:
        self.folder, self.record = folder, record
        self._splits = {
            split: table.slice(info["first_row"], info["num_windows"]) for split, info in record["splits"].items()
        }

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Opens what `prepare_corpus` wrote; ValueError when it is missing or damaged."""
        folder = Path(folder)
        try:
            record = json.loads((folder / _RECORD).read_text())
            intact = record["version"] == _VERSION and record["windows_sha256"] == file_sha256(folder / _WINDOWS)
        except FileNotFoundError as error:
            raise ValueError(f"corpus: {error.filename} does not exist; prepare the corpus first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"corpus: {folder / _RECORD} is damaged: {error}") from error
        if not intact:
            raise ValueError(f"corpus: {folder / _WINDOWS} is not the file that {_RECORD} describes; prepare it again")
        return cls(folder, record, pq.read_table(folder / _WINDOWS))

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def num_windows(self, split: str) -> int:
        return int(self._info(split)["num_windows"])

    def num_bytes(self, split: str) -> int:
        return int(self._info(split)["num_bytes"])

    def fingerprint(self, split: str) -> str:
        """Hash over the windows of the split: the same text in the same windows, the same fingerprint."""
        return str(self._info(split)["fingerprint"])

    def window(self, split: str, index: int) -> Window:
        """The window at `index`, from 0 to `num_windows(split) - 1`; IndexError outside of it."""
        if not 0 <= index < self.num_windows(split):
            raise IndexError(f"window {index} of {self.num_windows(split)} in split {split!r}")
        row = {name: self._splits[split].column(name)[index].as_py() for name in ("text", "document", "start_byte")}
        return Window(**row, index=index)

    def texts(self, split: str) -> Iterator[bytes]:
        """The windows' bytes in order."""
        self._info(split)
        for value in self._splits[split].column("text"):
            yield value.as_py()

    def _info(self, split: str) -> dict[str, Any]:
        if split not in self._splits:
            raise ValueError(f"split: corpus {self.name!r} has no {split!r}, only {', '.join(self._splits)}")
        info: dict[str, Any] = self.record["splits"][split]
        return info


def prepare_corpus(config: CorpusConfig, folder: Path | str) -> Corpus:
    """Splits the corpus into windows below `folder`, or opens it when that was done with this config and these files.

    Raises:
        ValueError: a setting or a file is wrong; the message names it.
        FetchError: the package cannot be had.
    """
    folder = Path(folder).absolute()
    files = local_files(config.files) if config.files is not None else package_files(_package(config))
    inputs = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if config.files is not None]
    made_from = {"config": config.model_dump(mode="json"), "inputs": inputs}
    with exclusive(folder):
        if (folder / _RECORD).is_file():
            try:
                corpus = Corpus.open(folder)
            except ValueError as error:
                _log.warning("%s; preparing it again", error)
            else:
                if corpus.record["made_from"] == made_from:
                    return corpus
        _write(config, files, made_from, folder)
    return Corpus.open(folder)


def _package(config: CorpusConfig) -> PackageOrigin:
    assert config.package is not None, "one origin is there: the config was validated"
    return config.package


def _write(config: CorpusConfig, files: Sequence[Path], made_from: dict[str, Any], folder: Path) -> None:
    read = list(documents(files, format_=config.format, separator=config.separator, text_field=config.text_field))
    unique = list({document.text: document for document in reversed(read) if document.text.strip()}.values())[::-1]
    if not unique:
        raise ValueError(f"{'files' if config.files is not None else 'package.glob'}: there is no text in them")
    splits, dropped = _split(config, unique)
    columns: dict[str, list[Any]] = {key: [] for key in _SCHEMA.names}
    record: dict[str, Any] = {
        "version": _VERSION,
        "name": config.name,
        "made_from": made_from,
        "num_documents": len(unique),
        "num_duplicates": sum(bool(document.text.strip()) for document in read) - len(unique),
        "num_dropped_as_shared": dropped,
        "splits": {},
    }
    for split, chosen in splits.items():
        windows = _windows(config, chosen, getattr(config, f"{split}_bytes"))
        if not windows:
            raise ValueError(f"{split}_bytes: no window fits; `window_bytes` is {config.window_bytes}")
        digest = hashlib.sha256()
        first_row, num_bytes = len(columns["split"]), 0
        for index, (document, start, text) in enumerate(windows):
            sha256 = hashlib.sha256(text)
            digest.update(sha256.digest())
            num_bytes += len(text)
            row = (split, index, document, start, text, sha256.hexdigest())
            for key, value in zip(_SCHEMA.names, row, strict=True):
                columns[key].append(value)
        record["splits"][split] = {
            "num_documents": len({document for document, _, _ in windows}),
            "num_windows": len(windows),
            "num_bytes": num_bytes,
            "first_row": first_row,
            "fingerprint": digest.hexdigest(),
        }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_WINDOWS}.partial"
    pq.write_table(pa.table(columns, schema=_SCHEMA), partial, compression="zstd")
    record["windows_sha256"] = file_sha256(partial)
    partial_record = folder / f".{_RECORD}.partial"
    partial_record.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(folder / _WINDOWS)  # a reader between the two renames sees that the hashes differ
    partial_record.replace(folder / _RECORD)


_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("document", pa.string()),
        ("start_byte", pa.int64()),
        ("text", pa.binary()),
        ("sha256", pa.string()),
    ]
)


def _split(config: CorpusConfig, unique: list[Document]) -> tuple[dict[str, list[Document]], int]:
    """Documents per split, in drawn order, and how many train documents were dropped for sharing text.

    The draw orders documents by a hash of seed and text: it depends neither on file names nor on other documents.
    """
    drawn = sorted(unique, key=lambda doc: hashlib.sha256(f"{config.seed}\0".encode() + doc.text).digest())
    wanted = config.held_out_share * sum(len(document.text) for document in drawn)
    ends = accumulate(len(document.text) for document in drawn)
    num_held_out = 1 + sum(end < wanted for end in ends)
    held_out, train = drawn[:num_held_out], drawn[num_held_out:]
    if not train:
        raise ValueError(
            f"held_out_share: nothing is left for training, the text has {len(unique)} document(s); "
            "documents are never cut in two: give more files, a smaller share, or a `separator`"
        )
    num_train = len(train)
    if config.shared_run_bytes is not None:
        texts, others = ([document.text for document in part] for part in (train, held_out))
        shared = sharing(texts, others, config.shared_run_bytes)
        train = [document for document, is_shared in zip(train, shared, strict=True) if not is_shared]
    dropped = num_train - len(train)
    if dropped:
        _log.warning("%d of %d train documents repeat text of held-out ones and are left out", dropped, num_train)
    if not train:
        raise ValueError(f"shared_run_bytes: every train document shares {config.shared_run_bytes} bytes with held-out")
    return {TRAIN: train, HELD_OUT: held_out}, dropped


def _windows(config: CorpusConfig, chosen: list[Document], cap: int | None) -> list[tuple[str, int, bytes]]:
    """Document, start and text of the windows, up to `cap` bytes in total."""
    windows: list[tuple[str, int, bytes]] = []
    total = 0
    for document in chosen:
        start = 0
        for end in cut(document.text, config.window_bytes):
            total += end - start
            if cap is not None and total > cap:
                return windows
            windows.append((document.name, start, document.text[start:end]))
            start = end
    return windows
