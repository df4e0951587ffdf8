"""Corpora of many shards without much text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from services.corpus.drawn import Sizes
from services.corpus.prepare import read_text


@contextmanager
def many_shards(shard_bytes: int) -> Iterator[None]:
    """Let whatever prepares a corpus in this process write shards of so many bytes of text."""
    defaults = read_text.__kwdefaults__
    assert defaults is not None
    with mock.patch.dict(defaults, sizes=Sizes(shard=shard_bytes)):
        yield
