"""Configuration of a corpus: where its text comes from and how it is split."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from services.base.settings import Settings
from services.corpus.package_text import PackageOrigin
from services.corpus.readers import Format


class CorpusConfig(Settings):
    """The text, from exactly one of `files` and `package`, and the way it is split and cut into windows.

    files: globs of .txt, .md, .rst, .jsonl or .parquet files (others with `format`), from the working directory.
    separator: bytes between documents in a text file; without it a file is one document.
    text_field: key (.jsonl) or column (.parquet) that holds the text.
    window_bytes: longest window. Windows are cut where all tokenizers involved have a token boundary, and fit them all.
    context_bytes: bytes of its document before a window that are read with it, without rows for them.
    target_context: whether the target reads them as the sources do, without loss; else it reads a window alone.
    held_out_share: share of the bytes whose documents are held out; `seed` draws them.
    train_bytes, held_out_bytes: use at most so many bytes of a split.
    shared_run_bytes: a train document is dropped when it has a run of so many bytes in common with a held-out one;
        null keeps such documents. Exact duplicates are dropped always.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "corpus"
    files: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    package: PackageOrigin | None = None
    format: Format | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    text_field: str = "text"
    window_bytes: Annotated[int, Field(ge=16, le=2**20)] = 1024
    context_bytes: Annotated[int, Field(ge=0, le=2**20)] = 0
    target_context: bool = True
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

    @property
    def package_origin(self) -> PackageOrigin:
        """The package that the text comes from; only for a corpus that has one."""
        assert self.package is not None, "one origin is there: the settings were validated"
        return self.package
