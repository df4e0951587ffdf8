"""Files below a folder or URL, and URLs that carry credentials."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileInfo, FileSelector, LocalFileSystem
from pydantic import Field, ValidationError, field_validator

from services.base.atomic import ABANDONED_SECONDS
from services.base.credentials import carries_credentials, refuse_credentials, without_credentials
from services.base.files import Files, open_location
from services.base.settings import Settings, explain


@pytest.mark.parametrize("root", ["{}", "file://{}", "local://{}", "memory://{}"])
def test_files_below_any_root(tmp_path: Path, root: str) -> None:
    files = Files(root.format(tmp_path / "store"))
    files.write("a/b/one.json", b"1")
    files.write("a/b/one.json", b"11")
    files.write("a/two.json", b"2")
    assert files.read("a/b/one.json") == b"11"
    assert files.read("a/none.json") is None
    assert (files.sizes("a/b"), files.sizes("a"), files.sizes("c")) == ({"one.json": 2}, {"two.json": 1}, {})
    assert (files.folders(""), files.folders("a")) == (["a"], ["b"])
    with files.open("a/b/one.json") as file:
        assert file.read() == b"11"
    files.delete("a/b/one.json")
    files.delete("a/b/one.json")
    assert files.sizes("a/b") == {}


def test_two_openers_of_one_url_see_the_same_files() -> None:
    Files("memory://shared/store").write("a", b"1")
    files, folder = open_location("memory://shared/store", "distill.storage")
    with files.open_input_stream(f"{folder}/a") as stream:
        assert stream.read() == b"1"


def test_what_cannot_be_opened_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^distill\.storage: cannot open nothing-of-the-kind://x"):
        open_location("nothing-of-the-kind://x", "distill.storage")


def test_a_root_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^service\.store: cannot write to"):
        Files(str(tmp_path / "file"))


def test_nothing_is_written_to_a_root_that_is_only_read(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "none"), read_only=True)
    assert (files.read("a"), files.sizes("")) == (None, {})
    assert not (tmp_path / "none").exists()


def test_half_written_files_are_swept(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files.write("a/b/whole", b"1")
    left = tmp_path / "a" / "b" / ".x.elsewhere.1.00.partial"
    left.write_bytes(b"half")
    assert files.sizes("a/b") == {"whole": 1}
    files.sweep("a/b")
    assert left.exists()
    os.utime(left, (0, 0))
    files.sweep("a/b")
    assert [path.name for path in left.parent.iterdir()] == ["whole"]
    assert ABANDONED_SECONDS >= 600


@pytest.mark.parametrize(
    ("url", "carries"),
    [
        ("s3://bucket/folder", False),
        ("s3://bucket/folder?region=eu-west-1&endpoint_override=localhost:9000&scheme=http", False),
        ("s3://id:secret@bucket/folder", True),
        ("s3://id@bucket/folder", True),
        ("s3://bucket/folder?access_key=id&secret_key=secret", True),
        ("s3://bucket/folder?secret_key=", True),
        ("gs://bucket?access_token=x", True),
        ("abfss://container@account.dfs.core.windows.net/folder", False),
        ("az://container/folder?sas_token=x", True),
        ("sftp://user:secret@host/folder", True),
        ("/srv/store?access_key=x", False),
        ("relative/user@host", False),
    ],
)
def test_urls_with_credentials_are_known(url: str, carries: bool) -> None:
    assert carries_credentials(url) is carries
    shown = without_credentials(f"(given: '{url}')")
    assert (url in shown) is not carries
    if not carries:
        refuse_credentials(url, "service.store")
        return
    with pytest.raises(ValueError, match=r"^service\.store: .* with credentials") as refused:
        refuse_credentials(url, "service.store")
    assert "secret@" not in str(refused.value)
    if url.startswith("s3"):
        assert "AWS_ACCESS_KEY_ID" in str(refused.value)


class _Section(Settings):
    store: str = Field()

    @field_validator("store")
    @classmethod
    def _without_credentials(cls, value: str) -> str:
        refuse_credentials(value, "service.store")
        return value


def test_the_explanation_of_a_mistake_repeats_no_secret() -> None:
    with pytest.raises(ValidationError) as mistake:
        _Section(store="s3://id:secret@bucket/folder")
    assert "AWS_SECRET_ACCESS_KEY" in explain(mistake.value)
    assert "secret@" not in explain(mistake.value)


def test_a_folder_that_appears_while_it_is_listed_is_no_error(tmp_path, monkeypatch):
    files, arrow = Files(str(tmp_path), "where"), LocalFileSystem()

    def listed_while_it_appears(selector: FileSelector) -> list[FileInfo]:
        """Arrow found nothing to list, and then that the folder is there."""
        if not (tmp_path / "new").exists():
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "file").write_bytes(b"x")
            raise FileNotFoundError("Cannot list directory")
        return arrow.get_file_info(selector)

    monkeypatch.setattr(files, "_files", SimpleNamespace(get_file_info=listed_while_it_appears))
    assert files.sizes("new") == {"file": 1}
