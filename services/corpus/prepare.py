"""Prepare a corpus in two steps, between which a caller may train a tokenizer on the train text:

    text = read_text(config, folder)             # documents, split into train and held-out
    target = ...                                 # may read text.train_texts(), is named after text.fingerprint
    corpus = plan_corpus(text, tokenizers)       # windows for all models that will read them, in a ledger

Windows are planned once, so that every source and the target see the same ones. Both steps reuse results of
the same settings, files and tokenizers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from fusion_core.vocabulary import Vocabulary
from services.base.errors import SettingError
from services.base.files import Files, open_location
from services.base.home import exclusive, lock_place
from services.base.processes import Workers
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Draw, DrawnDocuments, Sizes
from services.corpus.ledger import RECORD, SINGLE_FILE, VERSION, WINDOWS, Corpus, shards_of
from services.corpus.package_text import package_files
from services.corpus.planning import PlannedShard, ShardTask, SplitPlan, plan_shard, splits_of, write_shards
from services.corpus.readers import local_files
from services.corpus.shards import split_fingerprint
from services.corpus.windows import Reader
from services.models.chat_tokenizer import ChatTokenizer

_SIZES = Sizes()
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

    def __init__(self, config: CorpusConfig, folder: str, sizes: Sizes) -> None:
        self.config, self.folder, self._sizes = config, folder, sizes
        self._files = local_files(config.files) if config.files is not None else package_files(config.package_origin)
        stats = [(path, path.stat()) for path in self._files if config.files is not None]
        inputs = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        self.made_from = {"config": config.deciding, "inputs": inputs}
        corpus = self.planned()
        self.fingerprint = corpus.record["train_text"] if corpus else self.documents.fingerprint

    @cached_property
    def documents(self) -> DrawnDocuments:
        """The documents; they are read when they are first needed, and kept on disk as long as this object."""
        return DrawnDocuments(self._files, self.config, lock_place(self.folder), self._sizes)

    def train_texts(self) -> Iterator[str]:
        """Yield the train documents, at most `train_bytes` of them."""
        return self.documents.train_texts(self.config.train_bytes)

    def planned(self) -> Corpus | None:
        """Return the corpus in the folder when it was made from the same text with the same settings."""
        if not self._is_there():
            return None
        try:
            corpus = Corpus.open(self.folder)
            if corpus.record["made_from"] != self.made_from:
                return None
            corpus.check_sizes()
        except ValueError as error:
            _log.warning("%s; it is prepared again", error)
            return None
        return corpus

    def _is_there(self) -> bool:
        files, folder = open_location(self.folder, "corpus.folder")
        return bool(files.get_file_info(f"{folder}/{RECORD}").type == fs.FileType.File)


def read_text(config: CorpusConfig, folder: Path | str, *, sizes: Sizes = _SIZES) -> CorpusText:
    """Return the text of a corpus that lies, or will lie, in `folder`, split into train and held-out documents.

    The folder may be a URL. Nothing is read when it holds a corpus of the same text and settings, until the documents
    are asked for.

    Raises:
        SettingError: a setting of the corpus cannot be honoured.
        ValueError: a file cannot be read; the message names it.
        FetchError: the package cannot be had.
    """
    location = str(folder) if "://" in str(folder) else str(Path(folder).absolute())
    return CorpusText(config, location, sizes)


def plan_corpus(text: CorpusText, tokenizers: Sequence[WindowTokenizer] = ()) -> Corpus:
    """Cut the documents into windows for `tokenizers` (without any: at white space), and write the ledger.

    A tokenizer that cannot be loaded is left out, with a warning. Raises what `read_text` raises.
    """
    planned_for = [
        [each.name, each.identity, each.max_tokens, each.reads_context, *([each.template] if each.template else [])]
        for each in tokenizers
    ]
    with exclusive(lock_place(text.folder)):
        corpus = text.planned()
        if corpus is None or corpus.record["planned_for"] != planned_for:
            _write_ledger(text, _readers(tokenizers), planned_for)
            corpus = Corpus.open(text.folder)
    return corpus


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
    """Write shards and record anew. Without its record, which is written last, a folder holds no corpus."""
    config, documents = text.config, text.documents
    files = Files(text.folder, "corpus.folder")
    files.delete(RECORD)
    with Workers(documents.num_workers, readers, documents.draw) as workers:
        splits = {split.name: _write_split(files, split, documents, workers, readers) for split in splits_of(config)}
    record: dict[str, Any] = {
        "version": VERSION,
        "name": config.name,
        "made_from": text.made_from,
        "train_text": text.fingerprint,
        "planned_for": planned_for,
        "vocabularies": {reader.name: reader.vocabulary.fingerprint for reader in readers},
        "num_documents": documents.num_documents,
        "num_duplicates": documents.num_duplicates,
        "num_dropped_as_shared": documents.num_dropped,
        "splits": splits,
    }
    files.write(RECORD, json.dumps(record, indent=2).encode() + b"\n")
    kept = {f"{WINDOWS}/{shard.file}" for split in record["splits"] for shard in shards_of(record, split)}
    for path in _files_below(files, WINDOWS):
        if path not in kept:
            files.delete(path)
    files.delete(SINGLE_FILE)


def _write_split(
    files: Files, split: SplitPlan, documents: DrawnDocuments, workers: Workers, readers: Sequence[Reader]
) -> dict[str, Any]:
    """Write the shards of a split, and return the ledger's entry for it."""
    tasks = list(documents.shards(split))
    if not tasks:
        raise SettingError(split.setting, "no train document is of this length and domain")
    planned = _within_cap(split, tasks, workers, partial(_plan, readers, documents.draw))
    shards, tally = write_shards(planned, lambda file, data: files.write(f"{WINDOWS}/{file}", data))
    turns = {"left_out": dict(tally.left_out), "refused_by": dict(tally.refused_by)}
    if not shards:
        left_out = f"; of the turns, {turns['left_out']} are left out" if split.config.is_conversations else ""
        raise SettingError(split.setting, f"no window fits; `window_bytes` is {split.window_bytes}{left_out}")
    counts = tally.counts
    if counts["num_shortened_contexts"] and not split.config.is_conversations:
        _log.warning(
            "context_bytes: %d windows of %s have less, or max_tokens would not do",
            counts["num_shortened_contexts"],
            split.name,
        )
    return {
        "num_documents": counts["num_documents"],
        "num_windows": counts["num_windows"],
        "num_bytes": counts["num_bytes"],
        "num_cuts": counts["num_cuts"],
        "num_cuts_at_boundaries": counts["num_cuts_at_boundaries"] if readers else None,
        "num_shortened_contexts": counts["num_shortened_contexts"],
        "fingerprint": split_fingerprint(shards),
        **({"turns": turns} if split.config.is_conversations else {}),
        "windows_per_group": split.windows_per_group,
        "shards": [shard.to_json() for shard in shards],
    }


def _within_cap(
    split: SplitPlan, tasks: Sequence[ShardTask], workers: Workers, plan_here: Callable[..., PlannedShard]
) -> Iterator[PlannedShard]:
    """Yield the shards of a split in order, the last one cut where the split is full."""
    left = split.max_bytes
    planned = workers.in_order(_plan, ((split, task, split.max_bytes) for task in tasks))
    with closing(planned):
        for task, shard in zip(tasks, planned, strict=True):
            if left is not None and shard.tally.counts["num_bytes"] > left:
                # It was planned before it was known how much of it there is room for.
                shard = plan_here(split, task, left)  # noqa: PLW2901
            yield shard
            if shard.is_cut:
                return
            left = None if left is None else left - shard.tally.counts["num_bytes"]


def _plan(
    readers: Sequence[Reader], draw: Draw, split: SplitPlan, task: ShardTask, max_bytes: int | None
) -> PlannedShard:
    return plan_shard(split, task.file, draw.documents(split, task), readers, max_bytes)


def _files_below(files: Files, folder: str) -> Iterator[str]:
    yield from (f"{folder}/{name}" for name in files.sizes(folder))
    for name in files.folders(folder):
        yield from _files_below(files, f"{folder}/{name}")
