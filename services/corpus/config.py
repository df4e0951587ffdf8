"""Configuration of a corpus: where its text comes from and how it is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from services.base.settings import Settings
from services.corpus.package_text import PackageOrigin
from services.corpus.readers import Format

_TURN_BYTES = 8192
_PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
_WindowBytes = Annotated[int, Field(ge=16, le=2**20)]


class PoolConfig(Settings):
    """Train documents that get windows of their own, beside those of the split `train`, in the split `train/NAME`.

    min_document_bytes, max_document_bytes: shortest and longest document.
    domains: domains of the documents, as `domain_field` names them; all when not set.
    window_bytes: longest window; default the corpus's.
    """

    min_document_bytes: Annotated[int, Field(ge=0)] = 0
    max_document_bytes: Annotated[int, Field(ge=1)] | None = None
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    window_bytes: _WindowBytes | None = None

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.max_document_bytes is not None and self.max_document_bytes < self.min_document_bytes:
            raise ValueError(
                f"max_document_bytes: {self.max_document_bytes} is less than min_document_bytes = "
                f"{self.min_document_bytes}"
            )
        return self


class RecalledConfig(Settings):
    """The stage that makes a short conversation of a long record: its key blocks with the question, then the answer.

    question, answer: keys or columns with text; or with lists of as many texts, of which each pair counts.
    labels: instead of `question`, one for each label; `answer` then holds a record's labels, and the answers are yes
        and no.
    budget_bytes: bytes of the key blocks.
    """

    question: Annotated[str, Field(min_length=1)] | None = None
    answer: Annotated[str, Field(min_length=1)]
    labels: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    budget_bytes: Annotated[int, Field(ge=64, le=2**20)] = 4096

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.question is None) == (self.labels is None):
            raise ValueError("give exactly one of `question` and `labels`")
        return self


class CorpusConfig(Settings):
    """The text, from exactly one of `files` and `package`, and the way it is split and cut into windows.

    files: globs of .txt, .md, .rst, .jsonl or .parquet files (others with `format`), from the working directory.
    separator: bytes between documents in a text file; without it a file is one document.
    text_field: key (.jsonl) or column (.parquet) that holds the text.
    recall: the files hold long records with questions, of which the recall service makes short conversations.
    domain_field: key or column that names a document's domain, such as news or code; none when not set.
    format: how the files are read, where their names do not say it; `conversations` reads .jsonl and .parquet files
        with `messages`, or `prompt` and `completion`, whose windows are the assistant's turns.
    window_bytes: longest window. Windows are cut where all tokenizers involved have a token boundary, and fit them all.
        Of conversations, the longest turn; longer ones are left out. By default 1,024, and 8,192 there.
    max_history_bytes: most bytes of the messages before a turn, as JSON; the oldest go first, system messages stay.
    context_bytes: most bytes of its document before a window that are read with it, without rows for them.
    target_context: whether the target reads them as the sources do, without loss; else it reads a window alone.
    held_out_share: share of the bytes whose documents are held out; `seed` draws them.
    train_bytes, held_out_bytes: use at most so many bytes of a split.
    shared_run_bytes: a train document is dropped when it has a run of so many bytes in common with a held-out one;
        null keeps such documents. Exact duplicates are dropped always.
    pools: by name, parts of the train documents with windows of their own: the further splits `train/NAME`, which may
        overlap. `train_bytes` caps each.
    folder: where the windows are kept: a folder, relative to the run's, or a URL such as s3://bucket/folder.
    workers: processes that prepare it; default one per core, and per 64 MiB of text. No window depends on it.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "corpus"
    files: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    package: PackageOrigin | None = None
    format: Format | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    text_field: str = "text"
    recall: RecalledConfig | None = None
    domain_field: Annotated[str, Field(min_length=1)] | None = None
    window_bytes: _WindowBytes = 1024
    max_history_bytes: Annotated[int, Field(ge=64, le=2**20)] = 16_384
    context_bytes: Annotated[int, Field(ge=0, le=2**20)] = 1024
    target_context: bool = True
    train_bytes: Annotated[int, Field(ge=1)] | None = None
    held_out_bytes: Annotated[int, Field(ge=1)] | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    shared_run_bytes: Annotated[int, Field(ge=16)] | None = 100
    seed: Annotated[int, Field(ge=0)] = 0
    pools: dict[_PoolName, PoolConfig] = Field({})
    folder: Annotated[str, Field(min_length=1)] = "corpus"
    workers: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _turns_are_long(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (values.get("format") == "conversations" or values.get("recall")):
            return {"window_bytes": _TURN_BYTES, **values}
        return values

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        """Raise ValueError for a setting that the format does not use and that says more than its default."""
        fields, only = type(self).model_fields, "only for conversations"
        unused: tuple[str, ...] = ("max_history_bytes",)
        if self.recall is not None:
            unused, only = ("separator", "context_bytes", "package", "format"), "not read with recall"
        elif self.is_conversations:
            unused, only = ("separator", "text_field", "context_bytes"), "not read with format: conversations"
        for key in unused:
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key}: {only}; leave it out")
        return self

    @model_validator(mode="after")
    def _key_blocks_fit(self) -> Self:
        if self.recall is not None and 2 * self.recall.budget_bytes > self.max_history_bytes:
            raise ValueError(
                f"recall.budget_bytes: {self.recall.budget_bytes} is more than half of max_history_bytes = "
                f"{self.max_history_bytes}, which the question and JSON's escapes count in as well"
            )
        return self

    @model_validator(mode="after")
    def _domains_are_known(self) -> Self:
        for name, pool in self.pools.items():
            if pool.domains is not None and self.domain_field is None:
                raise ValueError(f"pools.{name}.domains: needs `domain_field`, which names the domain of a record")
        return self

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the windows, as the ledger records them.

        Settings of later versions are left out where they say nothing, so that earlier ledgers stay valid.
        """
        values = self.model_dump(mode="json", exclude={"folder", "workers"})
        return {key: value for key, value in values.items() if key not in {"domain_field", "pools", "recall"} or value}

    @property
    def is_conversations(self) -> bool:
        """True when the documents are conversations."""
        return self.format == "conversations" or self.recall is not None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.files is None) == (self.package is None):
            raise ValueError("give exactly one of `files` and `package`")
        return self

    @property
    def package_origin(self) -> PackageOrigin:
        """The package that the text comes from; only for a corpus that has one."""
        assert self.package is not None, "one origin is there: the settings were validated"
        return self.package
