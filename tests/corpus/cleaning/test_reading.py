"""Files of every kind become documents; what holds no text is dropped with the reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from services.base.errors import SettingError
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.inputs import deal, input_files
from services.corpus.cleaning.reading import read_files
from services.corpus.cleaning.shards import Drop, RawDocument
from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url


def read(pattern: str, **changes: Any) -> list[tuple[RawDocument, Drop | None]]:
    config = CurateConfig(files=(pattern,), **changes)
    return list(read_files(input_files(config.files), config))


def zstd(data: bytes) -> bytes:
    """Two frames, as tools write that append."""
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_rows_and_texts_are_read_whatever_compresses_them(tmp_path: Path, suffix: str, compress: Any) -> None:
    rows = [{"id": 7, "text": "one\u00e9", "url": "https://a.example/x", "domain": "d"}, {"text": "two"}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(compress(data))
    (tmp_path / f"whole.txt{suffix}").write_bytes(compress(b"a text\n" * 50))
    [(first, _), (second, _)] = read(f"{tmp_path}/*.jsonl*")
    assert (first.id, first.text, first.url, first.domain) == ("7", "one\u00e9", "https://a.example/x", "d")
    assert (second.id, second.domain) == (f"rows.jsonl{suffix}#1", "rows")
    [(text, drop)] = read(f"{tmp_path}/*.txt*")
    assert (text.text, text.domain, text.kind, drop) == ("a text\n" * 50, "documents", "text", None)


def test_parquet_has_the_same_fields_as_lines(tmp_path: Path) -> None:
    table = pa.table({"content": ["one", None], "path": ["lib/a.py", None], "repository": ["r", None], "other": [1, 2]})
    pq.write_table(table, tmp_path / "rows.parquet")
    [(code, kept), (_, missing)] = read(f"{tmp_path}/*.parquet", text_field="content")
    assert kept is None
    assert (code.kind, code.language, code.repository, code.path) == ("code", "python", "r", "lib/a.py")
    assert missing is not None and missing.reason == "no_text"


def test_what_is_no_text_is_dropped_with_a_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{oops",
        b'{"body": "x"}',
        b'{"text": "\\ud800"}',
        b'{"text": " "}',
        b'{"text": "\xff"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    reasons = [drop.reason if drop else None for _, drop in read(f"{tmp_path}/*")]
    assert reasons == ["not_utf8", None, "not_json", "no_text", "not_utf8", "empty", "not_utf8"]


def test_a_page_is_reduced_to_its_main_text(tmp_path: Path) -> None:
    story = (
        "<p>"
        + "</p><p>".join(f"Sentence number {n} of the story is long enough to be text." for n in range(12))
        + "</p>"
    )
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/x'>Sign in</a></li></ul></nav>"
    (tmp_path / "page.html").write_text(f"<html><body>{menu}<article>{story}</article></body></html>")
    (tmp_path / "menu.html").write_text(f"<html><body>{menu}</body></html>")
    [(_, no_text), (page, kept)] = read(f"{tmp_path}/*.html")
    assert no_text is not None and no_text.reason == "no_main_text"
    assert kept is None
    assert "Sentence number 11" in page.text
    assert "Sign in" not in page.text


def test_code_knows_its_repository(tmp_path: Path) -> None:
    for name in ("one/src/a.rs", "two/b.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("code")
    [(rust, _), (python, _)] = read(f"{tmp_path}/**/*.*")
    assert (rust.repository, rust.path, rust.language, rust.domain) == ("one", "src/a.rs", "rust", "one")
    assert (python.repository, python.path, python.language) == ("two", "b.py", "python")


def test_files_of_an_object_store_are_read(tmp_path: Path) -> None:
    with fsspec.open("memory://heap/a/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "far away"}\n'))
    [(document, _)] = read("memory://heap/**/*.jsonl.gz")
    assert (document.text, document.id) == ("far away", "rows.jsonl.gz#0")
    with pytest.raises(SettingError, match=r"files.0: no file matches 'memory://nothing/\*'"):
        read("memory://nothing/*")


def test_rows_of_every_kind_are_read_from_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["from a table"]}), table)
    objects = {
        "web/a.jsonl": b'{"text": "plain"}\n', "web/b.jsonl.zst": zstd(b'{"text": "packed"}\n'),
        "web/deep/c.parquet": table.getvalue().to_pybytes(), "other/d.jsonl": b'{"text": "not asked for"}\n',
    }  # fmt: skip
    with s3_server("bucket") as server, rights_on_prefix(server, "bucket", "team") as (address, refused):
        files, root = fs.FileSystem.from_uri(s3_url(address, "bucket/team/heap"))
        for name, data in objects.items():
            with files.open_output_stream(f"{root}/{name}", compression=None) as stream:
                stream.write(data)
        pattern = s3_url(address, "bucket/team/heap/web/**/*.*")
        found = {document.id: document.text for document, _ in read(pattern)}
        assert refused == []
        with pytest.raises(SettingError, match=r"files.0: no file matches"):
            read(s3_url(address, "bucket/team/none/*"))
    assert found == {
        "a.jsonl#0": "plain", "b.jsonl.zst#0": "packed", "deep/c.parquet#0": "from a table",
    }  # fmt: skip


def test_a_file_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(SettingError, match=r"files: picture.png is none of .*; set `format`"):
        read(f"{tmp_path}/*")


def test_files_are_dealt_evenly_and_each_once(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("x" * (number * 100))
    files = input_files([f"{tmp_path}/*.txt"])
    shards = deal(files, 4)
    assert sorted(file.name for shard in shards for file in shard) == sorted(file.name for file in files)
    loads = [sum(file.num_bytes for file in shard) for shard in shards]
    assert max(loads) - min(loads) <= 3900
    assert deal(list(reversed(files)), 4) == shards
