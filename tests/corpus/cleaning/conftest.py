"""A small mixed heap on disk, and cleaning in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.tasks import local_workers
from tests.fakes.heap.planted import Heap, make_heap, write_heap
from tests.fakes.heap.texts import prose

Clean = Callable[[CurateConfig, Path], dict[str, Any]]


@pytest.fixture(scope="session")
def heap(tmp_path_factory: pytest.TempPathFactory) -> tuple[Heap, Path]:
    """The heap, and the folder with raw/, severe.txt and suite.jsonl."""
    folder = tmp_path_factory.mktemp("heap")
    texts = prose(most=110)
    suite = [" ".join(text.split(" ")[:60]) for _, text in texts[:12]]
    made = make_heap(texts[12:], suite, each=6, plain=40)
    write_heap(made, folder)
    return made, folder


def settings(folder: Path, **changes: Any) -> CurateConfig:
    """The section for the heap, with every step that it has something for."""
    values: dict[str, Any] = {
        "files": [str(folder / "raw/**/*")],
        "shards": 2,
        "rules": {"fineweb": False, "gopher": False},
        "safety": {"severe_words": [str(folder / "severe.txt")]},
        "decontaminate": {"suites": [str(folder / "suite.jsonl")]},
    }
    return CurateConfig.model_validate(values | changes)


def run_clean(config: CurateConfig, out: Path) -> dict[str, Any]:
    with local_workers(1) as run_all:
        return clean(config, out, run_all)


def rows_of(folder: Path, pattern: str) -> list[dict[str, str]]:
    """The rows of all shards that a glob names."""
    return [row for path in sorted(folder.glob(pattern)) for row in pq.read_table(path).to_pylist()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a cleaned folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
