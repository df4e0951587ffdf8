"""The store: what was kept comes back in any process, by key or place; what is damaged counts as absent."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import source_pb2
from fusion_core.blocks import Block
from services.store import uncaptured
from services.store.identity import SourceIdentity, window_key
from services.store.index import KeyIndex
from services.store.source_store import SourceStore
from services.store.store import BlockStore
from services.wire.passage import Passage
from tests.fakes.blocks import scored_block


def identity(top_k: int = 4, **changes: str) -> SourceIdentity:
    values = {"vocabulary": "v", "engine": "vllm 0.32.0", **changes}
    return SourceIdentity.of(source_pb2.GetSourceInfoResponse(**values), top_k)


def key(number: int) -> bytes:
    return window_key(Passage(f"text {number}".encode()))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("kept/*.parquet"))


def opened(root: str) -> SourceStore:
    return BlockStore(root).source(identity())


def assert_same(back: Block | None, block: Block) -> None:
    assert back is not None
    assert back.text_bytes == block.text_bytes
    np.testing.assert_array_equal(back.gold_T, block.gold_T)


@pytest.fixture(params=["folder", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"folder": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4()}"}[request.param]


def test_what_was_kept_is_found_at_once_and_by_the_next_process(root: str) -> None:
    store = BlockStore(root)
    source = store.source(identity())
    assert source.find(key(0)) is None
    blocks = [scored_block(5, 4, seed) for seed in range(20)]
    for number, block in enumerate(blocks):
        source.put(key(number), block)
    assert_same(source.find(key(3)), blocks[3])
    store.flush()
    assert BlockStore(root).identities() == [identity()]
    other = opened(root)
    for number, block in enumerate(blocks):
        assert_same(source.find(key(number)), block)
        assert_same(other.find(key(number)), block)
    assert other.find(key(99)) is None
    assert BlockStore(root).source(identity(top_k=5)).find(key(0)) is None


def test_many_windows_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncaptured, "_FLUSH_WINDOWS", 8)
    source = opened(str(tmp_path))
    for number in range(20):
        source.put(key(number), scored_block(5, 4, number))
    source.flush()
    assert len(files_of(tmp_path)) == 3


def test_small_files_become_one(tmp_path: Path) -> None:
    source = opened(str(tmp_path))
    for number in range(40):
        source.put(key(number), scored_block(5, 4, number))
        source.flush()
    assert len(files_of(tmp_path)) < 16
    for number in range(40):
        assert_same(source.find(key(number)), scored_block(5, 4, number))
        assert_same(opened(str(tmp_path)).find(key(number)), scored_block(5, 4, number))


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_damaged_file_counts_as_absent(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    source = opened(str(tmp_path))
    source.put(key(0), scored_block())
    source.flush()
    [file] = files_of(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    source = opened(str(tmp_path))
    assert source.find(key(0)) is None
    source.put(key(0), scored_block())
    source.flush()
    assert_same(source.find(key(0)), scored_block())


def test_what_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = opened(str(tmp_path / "store"))
    (tmp_path / "store").rmdir()
    (tmp_path / "store").write_text("in the way")
    source.put(key(0), scored_block())
    with caplog.at_level("WARNING", "ray.serve"):
        source.flush()
    assert "cannot keep 1 windows" in caplog.text


def test_identity_depends_on_all_that_matters() -> None:
    fields = ("revision", "vocabulary", "bos_token", "eos_token", "engine", "dtype")
    changed = [identity(), identity(top_k=5), *(identity(**{field: "x"}) for field in fields)]
    assert len({each.digest for each in changed}) == len(changed)
    same = [identity(model="elsewhere"), identity(engine="vllm 0.33.1")]
    assert {each.digest for each in same} == {identity().digest}
    assert identity(engine="synthetic 1 (seed 1)").digest != identity(engine="synthetic 1 (seed 2)").digest
    narrow = [identity(engine=f"vllm {version} (quantization=fp8)").digest for version in ("0.32.0", "0.33.1")]
    assert narrow[0] == narrow[1] != identity().digest


def test_key_depends_on_all_of_the_passage() -> None:
    passages = [Passage(b"abc"), Passage(b"abd"), Passage(b"abc", b"x"), Passage(b"bc", b"a")]
    passages.append(Passage(b"abc", ends_document=True))
    assert len(set(map(window_key, passages))) == len(passages)


def test_index_finds_every_key() -> None:
    rng, index = np.random.default_rng(0), KeyIndex()
    keys = [rng.bytes(16) for _ in range(100_000)]
    for shard, start in enumerate(range(0, len(keys), 5000)):
        index.add(shard, keys[start : start + 5000])
    for number in range(0, len(keys), 997):
        assert index.find(keys[number]) == [divmod(number, 5000)]
    assert index.find(b"x" * 16) == []


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"service\.store: cannot write to .*file"):
        BlockStore(str(tmp_path / "file" / "below"))


def test_unknown_url_is_named() -> None:
    with pytest.raises(ValueError, match=r"service\.store: cannot open nope://x"):
        BlockStore("nope://x")
