"""Prepares a corpus: reads and splits its documents, plans their windows, writes the ledger.

Windows are planned once, for all models that will read them, so that every source and the target see the same ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core.vocabulary import Vocabulary
from services.base.home import exclusive
from services.corpus.config import CorpusConfig
from services.corpus.document import Document
from services.corpus.ledger import HELD_OUT, RECORD, SCHEMA, TRAIN, VERSION, WINDOWS, Corpus
from services.corpus.package_text import PackageOrigin, package_files
from services.corpus.readers import documents, local_files
from services.corpus.split import SplitDocuments, split_documents
from services.corpus.windows import PlannedWindow, Reader, plan_windows
from services.models.packages import file_sha256

_BATCH_BYTES = 1 << 24
"""Documents whose windows are planned together: about so much text."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowTokenizer:
    """A tokenizer that the windows are planned for.

    Attributes:
        name: as messages name it.
        identity: changes when the tokenizer does; known without loading it.
        load: loads it, or raises ValueError.
        max_tokens, reads_context: as in `corpus_windows.Reader`.
    """

    name: str
    identity: str
    load: Callable[[], Vocabulary]
    max_tokens: int | None = None
    reads_context: bool = True


@dataclass(frozen=True, slots=True)
class TrainText:
    """The text of the train split, before it is cut into windows: what a target's own tokenizer is trained on.

    `texts` reads the documents again when the corpus was there already.
    """

    fingerprint: str
    texts: Callable[[], Iterator[str]]


Tokenizers = Callable[[TrainText], Sequence[WindowTokenizer]]
"""Gives the tokenizers that windows are planned for; one of them may have to be trained first."""


def no_tokenizers(text: TrainText) -> Sequence[WindowTokenizer]:
    """For windows that only whitespace decides."""
    return ()


def prepare_corpus(config: CorpusConfig, folder: Path | str, tokenizers: Tokenizers = no_tokenizers) -> Corpus:
    """Splits the corpus into windows below `folder`, or opens it when that was done with this config and these files.

    Other `tokenizers` or limits make new windows. A tokenizer that cannot be loaded is left out, with a warning.

    Raises:
        ValueError: a setting or a file is wrong; the message names it.
        FetchError: the package cannot be had.
    """
    folder = Path(folder).absolute()
    files = local_files(config.files) if config.files is not None else package_files(_package(config))

    @cache
    def read() -> SplitDocuments:
        found = documents(files, format_=config.format, separator=config.separator, text_field=config.text_field)
        split = split_documents(
            found, held_out_share=config.held_out_share, shared_run_bytes=config.shared_run_bytes, seed=config.seed
        )
        if not split.train:
            raise ValueError(f"{'files' if config.files is not None else 'package.glob'}: there is no text in them")
        return split

    inputs = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if config.files is not None]
    made_from = {"config": config.model_dump(mode="json"), "inputs": inputs}
    with exclusive(folder):
        corpus = _opened(folder, made_from)
        fingerprint = corpus.record["train_text"] if corpus else _text_hash(read().train_texts(config.train_bytes))
        wanted = list(tokenizers(TrainText(fingerprint, lambda: read().train_texts(config.train_bytes))))
        planned_for = [[wish.name, wish.identity, wish.max_tokens, wish.reads_context] for wish in wanted]
        if corpus is not None and corpus.record["planned_for"] == planned_for:
            return corpus
        head = {"made_from": made_from, "train_text": fingerprint, "planned_for": planned_for}
        _write(config, read(), wanted, head, folder)
    return Corpus.open(folder)


def _opened(folder: Path, made_from: dict[str, Any]) -> Corpus | None:
    """The corpus in the folder when it was made from the same text with the same settings."""
    if not (folder / RECORD).is_file():
        return None
    try:
        corpus = Corpus.open(folder)
    except ValueError as error:
        _log.warning("%s; preparing it again", error)
        return None
    return corpus if corpus.record["made_from"] == made_from else None


def _text_hash(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _package(config: CorpusConfig) -> PackageOrigin:
    assert config.package is not None, "one origin is there: the config was validated"
    return config.package


def _write(
    config: CorpusConfig,
    split: SplitDocuments,
    tokenizers: Sequence[WindowTokenizer],
    head: dict[str, Any],
    folder: Path,
) -> None:
    readers = _readers(tokenizers)
    columns: dict[str, list[Any]] = {key: [] for key in SCHEMA.names}
    record: dict[str, Any] = {
        "version": VERSION,
        "name": config.name,
        **head,
        "vocabularies": {reader.name: reader.vocabulary.fingerprint for reader in readers},
        "num_documents": split.num_documents,
        "num_duplicates": split.num_duplicates,
        "num_dropped_as_shared": split.num_dropped,
        "splits": {},
    }
    parts = ((TRAIN, split.train, config.train_bytes), (HELD_OUT, split.held_out, config.held_out_bytes))
    for name, chosen, cap in parts:
        first_row, num_bytes, digest = len(columns["split"]), 0, hashlib.sha256()
        num_cuts = num_shared = num_shortened = 0
        for index, (document, window) in enumerate(_windows(config, chosen, cap, readers)):
            text, ends_document = document.text[window.start : window.end], window.end == len(document.text)
            sha256 = hashlib.sha256(text)
            digest.update(sha256.digest() + f"{window.start - window.context_start}:{int(ends_document)};".encode())
            place = (name, index, document.name, window.start, text, sha256.hexdigest())
            row = (*place, window.context_start, ends_document)
            for key, value in zip(SCHEMA.names, row, strict=True):
                columns[key].append(value)
            num_bytes += len(text)
            num_cuts += window.start > 0
            num_shared += window.start > 0 and window.at_boundary
            num_shortened += window.shortened
        num_windows = len(columns["split"]) - first_row
        if not num_windows:
            raise ValueError(f"{name}_bytes: no window fits; `window_bytes` is {config.window_bytes}")
        if num_shortened:
            _log.warning("context_bytes: %d windows have less, or max_tokens would not do", num_shortened)
        record["splits"][name] = {
            "num_documents": len(set(columns["document"][first_row:])),
            "num_windows": num_windows,
            "num_bytes": num_bytes,
            "num_cuts": num_cuts,
            "num_cuts_at_boundaries": num_shared if readers else None,
            "num_shortened_contexts": num_shortened,
            "first_row": first_row,
            "fingerprint": digest.hexdigest(),
        }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WINDOWS}.partial"
    pq.write_table(pa.table(columns, schema=SCHEMA), partial, compression="zstd")
    record["windows_sha256"] = file_sha256(partial)
    partial_record = folder / f".{RECORD}.partial"
    partial_record.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(folder / WINDOWS)  # a reader between the two renames sees that the hashes differ
    partial_record.replace(folder / RECORD)


def _windows(
    config: CorpusConfig, chosen: Sequence[Document], cap: int | None, readers: Sequence[Reader]
) -> Iterator[tuple[Document, PlannedWindow]]:
    """The windows of the documents, up to `cap` bytes in total."""
    total = 0
    for batch in _batches(chosen):
        texts = [document.text for document in batch]
        plans = plan_windows(texts, config.window_bytes, config.context_bytes, readers)
        for document, windows in zip(batch, plans, strict=True):
            for window in windows:
                total += window.end - window.start
                if cap is not None and total > cap:
                    return
                yield document, window


def _batches(chosen: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in chosen:
        batch.append(document)
        num_bytes += len(document.text)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    yield batch


def _readers(tokenizers: Sequence[WindowTokenizer]) -> list[Reader]:
    """The tokenizers that can be loaded, each loaded once."""
    loaded: dict[str, Vocabulary] = {}
    readers = []
    for wish in tokenizers:
        try:
            if wish.identity not in loaded:
                loaded[wish.identity] = wish.load()
        except ValueError as error:
            _log.warning("windows are planned without the tokenizer of %s: %s", wish.name, error)
        else:
            readers.append(Reader(wish.name, loaded[wish.identity], wish.max_tokens, wish.reads_context))
    return readers
