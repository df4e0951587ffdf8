"""Keys of captured splits: found in a sorted file by a few reads, whatever their number and distribution."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.base.files import Files
from services.store.capture_plan import CapturePlan, Place, capture_folder, shard_path, write_plan
from services.store.captured_keys import find_key, sorted_keys, write_keys
from services.store.rows import encode_row
from services.store.shard import write_shard
from services.store.shard_reader import ShardReader
from services.store.source_store import SourceStore
from services.store.uncaptured import UncapturedWindows
from tests.fakes.blocks import scored_block
from tests.store.test_store import assert_same, identity, key

SPLIT = "f" * 64


class CountingFiles(Files):
    """Counts reads at random places, and records the folders that were listed."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.num_reads = 0
        self.listed: list[str] = []

    def open(self, path: str) -> Any:
        file, files = super().open(path), self

        class Counting:
            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                files.num_reads += name == "read"
                return getattr(file, name)

        return Counting() if path.endswith("keys.sorted") else file

    def sizes(self, folder: str) -> dict[str, int]:
        self.listed.append(folder)
        return super().sizes(folder)


@given(st.lists(st.binary(min_size=16, max_size=16) | st.integers(0, 9).map(lambda n: bytes([n]) * 16), max_size=60))
def test_every_key_is_found_and_no_other(keys: list[bytes]) -> None:
    files = Files("memory://captured-keys")
    write_keys(files, "split", sorted_keys(b"".join(keys)))
    for each in keys:
        index = find_key(files, "split", each)
        assert index is not None
        assert keys[index] == each
    other = b"not a key at all"
    assert find_key(files, "split", other) == (keys.index(other) if other in keys else None)
    assert find_key(files, "nothing here", other) is None


@pytest.mark.parametrize(("spread", "most_reads"), [("even", 3), ("all in front", 14)])
def test_a_key_among_very_many_takes_few_reads(tmp_path: Path, spread: str, most_reads: int) -> None:
    rng = np.random.default_rng(0)
    keys_NB = rng.integers(0, 256, (300_000, 16), dtype=np.uint8)
    if spread == "all in front":
        keys_NB[:, :5] = 0
    files = CountingFiles(str(tmp_path))
    write_keys(files, "split", sorted_keys(keys_NB.tobytes()))
    for index in range(0, len(keys_NB), 9973):
        files.num_reads = 0
        assert find_key(files, "split", keys_NB[index].tobytes()) == index
        assert files.num_reads <= most_reads
        absent = bytearray(keys_NB[index].tobytes())
        absent[-1] ^= 255
        assert find_key(files, "split", bytes(absent)) is None


def capture(files: Files, num_windows: int, windows_per_shard: int) -> None:
    """Writes a finished capture whose window n is `scored_block(5, 4, n)` under `key(n)`."""
    folder = capture_folder(identity().digest, SPLIT)
    plan = CapturePlan(
        corpus="c", split="train", fingerprint=SPLIT, num_windows=num_windows, windows_per_shard=windows_per_shard
    )
    write_plan(files, folder, plan)
    for shard in range(plan.num_shards):
        rows = [encode_row(key(index), scored_block(5, 4, index)) for index in plan.windows(shard)]
        write_shard(files, shard_path(folder, shard), rows)
    write_keys(files, folder, sorted_keys(b"".join(key(index) for index in range(num_windows))))


def test_captured_windows_are_found_by_place_and_by_key_and_never_listed(tmp_path: Path) -> None:
    files = CountingFiles(str(tmp_path))
    capture(files, 20, 2)
    store = SourceStore(files, identity())
    for index in range(20):
        assert_same(store.find(key(index), Place(SPLIT, index)), scored_block(5, 4, index))
        assert_same(store.find(key(index)), scored_block(5, 4, index))
        assert_same(store.find(key(index), Place("another split", 0)), scored_block(5, 4, index))
    assert files.listed == []
    assert store.find(key(20)) is None
    assert files.listed == [f"{identity().digest}/kept"]


def test_hits_do_not_wait_while_others_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread looks for what other processes have written, on a store that does not answer; the rest are served."""
    listing, answered = threading.Event(), threading.Event()

    class SlowFiles(Files):
        slow = False

        def sizes(self, folder: str) -> dict[str, int]:
            if self.slow:
                listing.set()
                assert answered.wait(60)
            return super().sizes(folder)

    files = SlowFiles(str(tmp_path))
    capture(files, 4, 2)
    store = SourceStore(files, identity())
    store.put(key(100), scored_block(5, 4, 100))
    store.flush()
    store.put(key(101), scored_block(5, 4, 101))
    assert store.find(key(99)) is None
    monkeypatch.setattr("services.store.uncaptured.REFRESH_SECONDS", 0.0)
    files.slow = True
    looking = threading.Thread(target=store.find, args=(key(99),))
    looking.start()
    try:
        assert listing.wait(60)
        for index, place in ((3, Place(SPLIT, 3)), (3, None), (100, None), (101, None)):
            assert_same(store.find(key(index), place), scored_block(5, 4, index))
        store.put(key(102), scored_block(5, 4, 102))
        store.flush()
        assert_same(store.find(key(102)), scored_block(5, 4, 102))
        assert store.find(key(98)) is None  # looked for by the other thread already
        assert looking.is_alive()
    finally:
        answered.set()
        looking.join()


def test_nothing_is_written_where_the_identity_cannot_be(tmp_path: Path) -> None:
    files, called = Files(str(tmp_path)), []

    def fails() -> None:
        called.append(True)
        raise OSError("no room")

    windows = UncapturedWindows(files, "kept", ShardReader(files), fails)
    windows.put(key(0), encode_row(key(0), scored_block()))
    windows.flush()
    assert (called, files.sizes("kept")) == ([True], {})
    assert windows.pending(key(0)) is None
