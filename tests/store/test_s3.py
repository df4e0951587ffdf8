"""The store on a real S3 server, with rights on one prefix only: HeadBucket is refused, as are all other objects."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
from pyarrow import fs

from services.base.files import Files, open_location
from services.store.backfill_list import BackfillList, BackfillWindow
from services.store.capture_plan import Place, capture_folder, read_complete, write_complete
from services.store.store import BlockStore
from tests.fakes.blocks import scored_block
from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url
from tests.store.test_captured_keys import SPLIT, capture
from tests.store.test_store import assert_same, identity, key, opened


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


@pytest.fixture
def refused(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that gives rights on bucket/team only, and the requests that it refused."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with rights_on_prefix(server, "bucket", "team") as (address, refused):
        yield address, refused


def test_windows_of_streams_and_captures(refused: tuple[str, list[str]]) -> None:
    address, requests = refused
    root = s3_url(address, "bucket/team/store")
    store = BlockStore(root)
    source = store.source(identity())
    for number in range(20):
        source.put(key(100 + number), scored_block(5, 4, number))
        source.flush()
    capture(store.files, 6, 2)
    folder = capture_folder(identity().digest, SPLIT)
    write_complete(store.files, folder, "digest")
    assert BlockStore(root).identities() == [identity()]
    other = opened(root)
    assert other.has_capture(SPLIT)
    assert read_complete(store.files, folder) == "digest"
    for number in range(6):
        assert_same(other.find(key(number), Place(SPLIT, number)), scored_block(5, 4, number))
        assert_same(other.find(key(number)), scored_block(5, 4, number))
    for number in range(20):
        assert_same(other.find(key(100 + number)), scored_block(5, 4, number))
    assert other.find(key(99)) is None
    assert len(other.uncaptured_shards()) < 20
    assert requests == []


def test_the_back_fill_list(refused: tuple[str, list[str]]) -> None:
    address, requests = refused
    listed = BackfillList(Files(s3_url(address, "bucket/team/list")))
    listed.add("corpus", "train", SPLIT, [BackfillWindow(index=3, missing=("a",))])
    [(path, part)] = listed.parts(SPLIT)
    assert part.windows[0].index == 3
    listed.done(path)
    assert list(listed.parts(SPLIT)) == []
    assert requests == []


def test_a_prefix_without_rights_is_named(refused: tuple[str, list[str]]) -> None:
    address, requests = refused
    with pytest.raises(ValueError, match=r"^service\.store: cannot write to s3://bucket/other\?.*ACCESS_DENIED"):
        BlockStore(s3_url(address, "bucket/other"))
    assert requests == ["PUT /bucket/other/.writable"]


def test_the_proxy_of_the_environment_is_used(refused: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has a name that only the proxy knows."""
    address, requests = refused
    monkeypatch.setenv("http_proxy", f"http://{address}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    files = Files(s3_url("objects.internal:9000", "bucket/team/proxied"))
    files.write("a", b"1")
    assert files.read("a") == b"1"
    assert requests == []
    monkeypatch.setenv("no_proxy", "objects.internal")
    with pytest.raises(ValueError, match=r"cannot write to s3://bucket/team/proxied"):
        Files(s3_url("objects.internal:9000", "bucket/team/proxied"))


def test_the_file_system_goes_to_other_processes(refused: tuple[str, list[str]]) -> None:
    """Ray hands it to every worker, which makes folders in it and copies files there."""
    address, requests = refused
    files, folder = pickle.loads(pickle.dumps(open_location(s3_url(address, "bucket/team/runs"), "distill.storage")))
    files.create_dir(f"{folder}/a", recursive=True)
    with files.open_output_stream(f"{folder}/a/file") as stream:
        stream.write(b"1")
    files.copy_file(f"{folder}/a/file", f"{folder}/a/copy")
    files.move(f"{folder}/a/copy", f"{folder}/a/moved")
    names = [info.base_name for info in files.get_file_info(fs.FileSelector(f"{folder}/a"))]
    assert sorted(names) == ["file", "moved"]
    files.delete_dir(f"{folder}/a")
    assert files.get_file_info(f"{folder}/a/file").type == fs.FileType.NotFound
    assert requests == []
