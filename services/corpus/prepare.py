"""Prepare a corpus in two steps, between which a caller may train a tokenizer on the train text:

    text = read_text(config, folder)             # documents, split into train and held-out
    target = ...                                 # may read text.train_texts(), is named after text.fingerprint
    corpus = plan_corpus(text, tokenizers)       # windows for all models that will read them, in a ledger

Windows are planned once, so that every source and the target see the same ones. Both steps reuse results of
the same settings, files and tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_core.vocabulary import Vocabulary
from services.base.atomic import drop_partial, whole_file, write_whole
from services.base.errors import SettingError
from services.base.home import exclusive
from services.corpus.config import CorpusConfig
from services.corpus.document import Conversation, Document
from services.corpus.ledger import HELD_OUT, RECORD, SCHEMA, TRAIN, TURN_SCHEMA, VERSION, WINDOWS, Corpus
from services.corpus.package_text import package_files
from services.corpus.readers import documents, local_files
from services.corpus.split import SplitDocuments, split_documents
from services.corpus.turns import PlannedTurn, TurnPlanner
from services.corpus.windows import PlannedWindow, Reader, plan_windows
from services.models.chat_tokenizer import ChatTokenizer
from services.models.packages import file_sha256

_BATCH_BYTES = 1 << 24
"""Approximate bytes of text in one batch of documents that are planned together."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowTokenizer:
    """A tokenizer that the windows are planned for.

    Attributes:
        name: as messages name it.
        identity: changes when the tokenizer does; known without loading it.
        load: loads it, or raises ValueError.
        max_tokens, reads_context, is_target: as in `windows.Reader`.
        template: changes when the model's chat template does; empty where it reads no conversations.
        load_chat: loads both, or raises ValueError; None where it reads no conversations.
    """

    name: str
    identity: str
    load: Callable[[], Vocabulary]
    max_tokens: int | None = None
    reads_context: bool = True
    is_target: bool = False
    template: str = ""
    load_chat: Callable[[], ChatTokenizer] | None = None


class CorpusText:
    """The documents of a corpus, split into train and held-out ones.

    Attributes:
        config, folder: what `read_text` was given.
        made_from: settings and input files, as the ledger records them.
        fingerprint: hash of the train text.
    """

    def __init__(self, config: CorpusConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._files = local_files(config.files) if config.files is not None else package_files(config.package_origin)
        stats = [(path, path.stat()) for path in self._files if config.files is not None]
        inputs = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        self.made_from = {"config": config.model_dump(mode="json"), "inputs": inputs}
        corpus = self.planned()
        self.fingerprint = corpus.record["train_text"] if corpus else _text_hash(self.train_texts())

    @cached_property
    def documents(self) -> SplitDocuments:
        """The documents of either split; they are read when they are first needed."""
        config = self.config
        found = documents(self._files, format_=config.format, separator=config.separator, text_field=config.text_field)
        split = split_documents(
            found, held_out_share=config.held_out_share, shared_run_bytes=config.shared_run_bytes, seed=config.seed
        )
        if not split.train:
            raise SettingError("files" if config.files is not None else "package.glob", "there is no text in them")
        return split

    def train_texts(self) -> Iterator[str]:
        """Yield the train documents, at most `train_bytes` of them."""
        return self.documents.train_texts(self.config.train_bytes)

    def planned(self) -> Corpus | None:
        """Return the corpus in the folder when it was made from the same text with the same settings."""
        if not (self.folder / RECORD).is_file():
            return None
        try:
            corpus = Corpus.open(self.folder)
        except ValueError as error:
            _log.warning("%s; preparing it again", error)
            return None
        return corpus if corpus.record["made_from"] == self.made_from else None


def read_text(config: CorpusConfig, folder: Path | str) -> CorpusText:
    """Return the text of a corpus that lies, or will lie, in `folder`, split into train and held-out documents.

    Nothing is read when the folder holds a corpus of the same text and settings, until the documents are asked for.

    Raises:
        SettingError: a setting of the corpus cannot be honoured.
        ValueError: a file cannot be read; the message names it.
        FetchError: the package cannot be had.
    """
    return CorpusText(config, Path(folder).absolute())


def plan_corpus(text: CorpusText, tokenizers: Sequence[WindowTokenizer] = ()) -> Corpus:
    """Cut the documents into windows for `tokenizers` (without any: at white space), and write the ledger.

    A tokenizer that cannot be loaded is left out, with a warning. Raises what `read_text` raises.
    """
    planned_for = [
        [each.name, each.identity, each.max_tokens, each.reads_context, *([each.template] if each.template else [])]
        for each in tokenizers
    ]
    with exclusive(text.folder):
        corpus = text.planned()
        if corpus is None or corpus.record["planned_for"] != planned_for:
            _write_ledger(text, _readers(tokenizers), planned_for)
            corpus = Corpus.open(text.folder)
    return corpus


def _text_hash(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _readers(tokenizers: Sequence[WindowTokenizer]) -> list[Reader]:
    """Return the tokenizers that can be loaded, each loaded once."""
    loaded: dict[tuple[str, str], tuple[Vocabulary, ChatTokenizer | None]] = {}
    readers = []
    for tokenizer in tokenizers:
        key = tokenizer.identity, tokenizer.template
        try:
            if key not in loaded:
                chat = tokenizer.load_chat() if tokenizer.load_chat is not None else None
                loaded[key] = (chat.vocabulary if chat else tokenizer.load()), chat
        except ValueError as error:
            _log.warning("windows are planned without the tokenizer of %s: %s", tokenizer.name, error)
        else:
            limits = tokenizer.max_tokens, tokenizer.reads_context
            vocabulary, chat = loaded[key]
            readers.append(Reader(tokenizer.name, vocabulary, *limits, chat, tokenizer.is_target))
    return readers


def _write_ledger(text: CorpusText, readers: Sequence[Reader], planned_for: list[list[Any]]) -> None:
    config, folder, split = text.config, text.folder, text.documents
    parts = ((TRAIN, split.train, config.train_bytes), (HELD_OUT, split.held_out, config.held_out_bytes))
    schema = TURN_SCHEMA if config.is_conversations else SCHEMA
    columns: dict[str, list[Any]] = {key: [] for key in schema.names}
    record: dict[str, Any] = {
        "version": VERSION,
        "name": config.name,
        "made_from": text.made_from,
        "train_text": text.fingerprint,
        "planned_for": planned_for,
        "vocabularies": {reader.name: reader.vocabulary.fingerprint for reader in readers},
        "num_documents": split.num_documents,
        "num_duplicates": split.num_duplicates,
        "num_dropped_as_shared": split.num_dropped,
        "splits": {name: _add_split(columns, name, chosen, cap, config, readers) for name, chosen, cap in parts},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WINDOWS, RECORD):
        drop_partial(folder / name)
    with whole_file(folder / WINDOWS) as partial:
        pq.write_table(pa.table(columns, schema=schema), partial, compression="zstd")
        record["windows_sha256"] = file_sha256(partial)
    # Between the two a reader sees that the hashes differ.
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _add_split(
    columns: dict[str, list[Any]],
    name: str,
    chosen: Sequence[Document],
    cap: int | None,
    config: CorpusConfig,
    readers: Sequence[Reader],
) -> dict[str, Any]:
    """Add the windows of a split to the table's columns, and return the ledger's entry for the split."""
    first_row, num_bytes, digest = len(columns["split"]), 0, hashlib.sha256()
    num_cuts = num_shared = num_shortened = 0
    turns = TurnPlanner(config.window_bytes, config.max_history_bytes, readers) if config.is_conversations else None
    windows = _windows(config, chosen, cap, readers) if turns is None else _turns(turns, chosen, cap)
    for index, (document, window, ends_document) in enumerate(windows):
        text = document.text[window.start : window.end]
        sha256 = hashlib.sha256(text)
        digest.update(sha256.digest() + f"{window.start - window.context_start}:{int(ends_document)};".encode())
        place = (name, index, document.name, window.start, text, sha256.hexdigest())
        row: tuple[Any, ...] = (*place, window.context_start, ends_document)
        if isinstance(window, PlannedTurn):
            digest.update(hashlib.sha256(window.messages).digest())
            row += (window.messages, window.turn)
        else:
            num_cuts += window.start > 0
            num_shared += window.start > 0 and window.at_boundary
        for key, value in zip(columns, row, strict=True):
            columns[key].append(value)
        num_bytes += len(text)
        num_shortened += window.shortened
    num_windows = len(columns["split"]) - first_row
    if not num_windows:
        left_out = f"; of the turns, {dict(turns.left_out)} are left out" if turns is not None else ""
        raise SettingError(f"{name}_bytes", f"no window fits; `window_bytes` is {config.window_bytes}{left_out}")
    if num_shortened and turns is None:
        _log.warning("context_bytes: %d windows have less, or max_tokens would not do", num_shortened)
    return {
        "num_documents": len(set(columns["document"][first_row:])),
        "num_windows": num_windows,
        "num_bytes": num_bytes,
        "num_cuts": num_cuts,
        "num_cuts_at_boundaries": num_shared if readers else None,
        "num_shortened_contexts": num_shortened,
        "first_row": first_row,
        "fingerprint": digest.hexdigest(),
        **({} if turns is None else {"turns": turns.counts()}),
    }


def _turns(
    planner: TurnPlanner, chosen: Sequence[Document], cap: int | None
) -> Iterator[tuple[Document, PlannedTurn, bool]]:
    """Yield the windows of conversations as `_windows` does those of documents."""
    total = 0
    for document in chosen:
        assert isinstance(document, Conversation), "the format decides what is read"
        for turn in planner.plan(document):
            total += turn.end - turn.start
            if cap is not None and total > cap:
                return
            yield document, turn, turn.ends


def _windows(
    config: CorpusConfig, chosen: Sequence[Document], cap: int | None, readers: Sequence[Reader]
) -> Iterator[tuple[Document, PlannedWindow, bool]]:
    """Yield the windows of the documents, up to `cap` bytes in total, and whether the document ends with each.

    Blank windows are left out.
    """
    total = 0
    for batch in _batches(chosen):
        texts = [document.text for document in batch]
        plans = plan_windows(texts, config.window_bytes, config.context_bytes, readers)
        for document, windows in zip(batch, plans, strict=True):
            written = [window for window in windows if not window.blank]
            for window in written:
                total += window.end - window.start
                if cap is not None and total > cap:
                    return
                yield document, window, window is written[-1]


def _batches(chosen: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in chosen:
        batch.append(document)
        num_bytes += len(document.text)
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
