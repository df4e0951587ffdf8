"""One store under several processes: what each wrote is found by all, and small shards become few."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from services.base.atomic import ABANDONED_SECONDS
from services.store import uncaptured
from tests.fakes.blocks import scored_block
from tests.store.test_store import assert_same, files_of, identity, key, opened

ROUNDS = 40


def put_in_step(root: str, barrier: Barrier) -> None:
    """Keeps the same windows as the other processes, and flushes after each, at the same time as they do."""
    store = opened(root)
    for number in range(ROUNDS):
        store.put(key(number), scored_block(5, 4, number))
        barrier.wait(60)
        store.flush()
        assert_same(store.find(key(number // 2)), scored_block(5, 4, number // 2))


def test_replicas_that_keep_the_same_windows_merge_each_others_shards(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    replicas = [spawn.Process(target=put_in_step, args=(str(tmp_path), barrier)) for _ in range(3)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join(120)
        assert replica.exitcode == 0
    store = opened(str(tmp_path))
    for number in range(ROUNDS):
        assert_same(store.find(key(number)), scored_block(5, 4, number))
    assert len(files_of(tmp_path)) < 16 + ROUNDS // 16


def test_a_shard_that_another_process_merged_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both keep the same windows; the second merges after the first has merged and deleted them all."""
    first, second = opened(str(tmp_path)), opened(str(tmp_path))
    for number in range(15):
        for store in (first, second):
            store.put(key(number), scored_block(5, 4, number))
            store.flush()
    first.put(key(15), scored_block(5, 4, 15))
    first.flush()
    assert len(files_of(tmp_path)) == 1
    with caplog.at_level("WARNING", "ray.serve"):
        for number in range(16, 50):
            second.put(key(number), scored_block(5, 4, number))
            second.flush()
    assert "cannot keep" not in caplog.text
    assert len(files_of(tmp_path)) <= 1 + 3 + 16
    monkeypatch.setattr(uncaptured, "_REFRESH_AT_ONCE_SECONDS", 0.0)
    for number in (0, 7, 15, 16, 49):
        for store in (first, second, opened(str(tmp_path))):
            if store is not first or number < 16:
                assert_same(store.find(key(number)), scored_block(5, 4, number))


def test_a_damaged_small_shard_stays_and_the_others_are_merged(tmp_path: Path) -> None:
    store = opened(str(tmp_path))
    store.put(key(0), scored_block(5, 4, 0))
    store.flush()
    [damaged] = files_of(tmp_path)
    damaged.write_bytes(b"damaged")
    for number in range(1, 17):
        store.put(key(number), scored_block(5, 4, number))
        store.flush()
    assert damaged in files_of(tmp_path)
    assert len(files_of(tmp_path)) <= 3
    assert_same(opened(str(tmp_path)).find(key(16)), scored_block(5, 4, 16))


def test_what_killed_writers_left_half_written_is_deleted_at_the_first_flush(tmp_path: Path) -> None:
    kept = tmp_path / identity().digest / "kept"
    kept.mkdir(parents=True)
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    old, young = (kept / f".{name}.{socket.gethostname()}.{dead.pid}.00.partial" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    before = old.stat().st_mtime - 2 * ABANDONED_SECONDS
    os.utime(old, (before, before))
    store = opened(str(tmp_path))
    store.put(key(0), scored_block())
    store.flush()
    assert not old.exists()
    assert young.exists()
