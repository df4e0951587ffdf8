"""The block store: what was put comes back, what is damaged counts as absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import source_pb2
from services.common.passage import Passage
from services.fusion.store import BlockStore
from tests.services.blocks import random_block

ABC = Passage(b"abc")


def key(top_k: int = 4, passage: Passage = ABC, **changes: str) -> str:
    return BlockStore.key(source_pb2.GetSourceInfoResponse(**changes), top_k, passage)


def test_put_then_get(tmp_path: Path) -> None:
    store, block = BlockStore(tmp_path), random_block()
    assert store.get(key()) is None
    store.put(key(), block)
    back = BlockStore(tmp_path).get(key())
    assert back is not None
    np.testing.assert_array_equal(back.gold_T, block.gold_T)


def test_key_depends_on_all_that_matters() -> None:
    fields = ("revision", "vocabulary", "bos_token", "engine", "dtype")
    passages = [Passage(b"abd"), Passage(b"abc", b"x"), Passage(b"bc", b"a"), Passage(b"abc", ends_document=True)]
    changed = [
        key(),
        key(top_k=5),
        *(key(passage=passage) for passage in passages),
        *(key(**{field: "x"}) for field in fields),
    ]
    assert len(set(changed)) == len(changed)


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_damaged_file_counts_as_absent(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    store = BlockStore(tmp_path)
    store.put(key(), random_block())
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_bytes(damage(file.read_bytes()))
    assert store.get(key()) is None
    store.put(key(), random_block())
    assert store.get(key()) is not None


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"service\.store: cannot write to .*file"):
        BlockStore(tmp_path / "file" / "below")
