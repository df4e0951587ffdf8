"""The ledger of windows: shards with an index, read a row group at a time; damage is named; the older file is read."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.base.errors import FailedPreconditionError
from services.base.files import Files
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus, Window
from services.corpus.prepare import plan_corpus, read_text
from tests.corpus.documents import documents_of, story, write_stories

SIZES = Sizes(shard=2000)
"""A shard has some three documents here."""


def sharded(folder: Path | str, config: CorpusConfig | None = None) -> Corpus:
    config = config or CorpusConfig(files=("in/*.txt",), window_bytes=128, context_bytes=300)
    return plan_corpus(read_text(config, folder, sizes=SIZES))


def windows(corpus: Corpus, split: str) -> list[Window]:
    return [corpus.window(split, index) for index in range(corpus.num_windows(split))]


def write_version_2(folder: Path, corpus: Corpus) -> None:
    """Write the same windows as earlier versions did: one file, with the rows of all splits behind each other."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    splits = {}
    for split in corpus.splits:
        splits[split] = {
            "first_row": len(rows),
            "num_windows": corpus.num_windows(split),
            "num_bytes": corpus.num_bytes(split),
            "fingerprint": f"of {split}",
        }
        for window in windows(corpus, split):
            row = {key: getattr(window, key) for key in ("index", "document", "start_byte", "text", "ends_document")}
            rows.append({"split": split, "context_start": window.start_byte - len(window.context), **row})
    pq.write_table(pa.Table.from_pylist(rows), folder / "windows.parquet")
    digest = hashlib.sha256((folder / "windows.parquet").read_bytes()).hexdigest()
    record = corpus.record | {"version": 2, "windows_sha256": digest, "splits": splits}
    (folder / "corpus.json").write_text(json.dumps(record))


def test_a_ledger_is_an_index_and_shards_that_any_reader_opens(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    corpus = sharded(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus.json", "windows"]
    record = json.loads((tmp_path / "out" / "corpus.json").read_text())
    for split in (TRAIN, HELD_OUT):
        shards = record["splits"][split]["shards"]
        files = sorted((tmp_path / "out" / "windows" / split).iterdir())
        assert [tmp_path / "out" / "windows" / shard["file"] for shard in shards] == files
        tables = [pq.read_table(path) for path in files]
        assert [shard["num_windows"] for shard in shards] == [table.num_rows for table in tables]
        assert [shard["file_bytes"] for shard in shards] == [path.stat().st_size for path in files]
        rows = pa.concat_tables(tables).to_pylist()
        assert [row["text"] for row in rows] == [window.text for window in windows(corpus, split)]
        assert {row["document"]: row["document_bytes"] for row in rows} == {
            f"{n:03}.txt": len(story(n)) for n in range(20) if f"{n:03}.txt" in {row["document"] for row in rows}
        }
    assert len(record["splits"][TRAIN]["shards"]) > 3


def test_shards_and_row_groups_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and contexts across the borders of shards and row groups are those of one shard."""
    write_stories(tmp_path / "in", 12)
    (tmp_path / "in" / "long.txt").write_text(story(77, 900))  # longer than several row groups
    config = CorpusConfig(files=("in/*.txt",), window_bytes=128, context_bytes=300)
    whole = plan_corpus(read_text(config, tmp_path / "whole"))
    monkeypatch.setattr("services.corpus.shards.GROUP_BYTES", 256)
    many = sharded(tmp_path / "many", config)
    assert many.record["splits"][TRAIN]["windows_per_group"] == 2
    for split in (TRAIN, HELD_OUT):
        assert windows(many, split) == windows(whole, split)
        assert list(many.texts(split)) == [window.text for window in windows(whole, split)]
    grouped = plan_corpus(read_text(config, tmp_path / "grouped"))
    assert [grouped.fingerprint(split) for split in grouped.splits] == [whole.fingerprint(s) for s in whole.splits]


def test_many_threads_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_OPEN_SHARDS", "_CACHED_GROUPS"):
        monkeypatch.setattr(f"services.corpus.shards.{limit}", 2)
    monkeypatch.setattr("services.corpus.shards.GROUP_BYTES", 256)
    write_stories(tmp_path / "in", 30)
    corpus = sharded(tmp_path / "out")
    alone = windows(corpus, TRAIN)
    order = random.Random(0).choices(range(len(alone)), k=2000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: corpus.window(TRAIN, index), order))
    assert found == [alone[index] for index in order]


def test_a_changed_byte_anywhere_in_a_shard_is_named(tmp_path: Path) -> None:
    """One byte at a time, the first 100 and some others: never another window, and the shard is named."""
    write_stories(tmp_path / "in")
    corpus = sharded(tmp_path / "out")
    shard = tmp_path / "out" / "windows" / corpus.record["splits"][TRAIN]["shards"][1]["file"]
    first = corpus.record["splits"][TRAIN]["shards"][0]["num_windows"]
    num_windows = corpus.record["splits"][TRAIN]["shards"][1]["num_windows"]
    expected, data = windows(corpus, TRAIN), shard.read_bytes()
    refused = 0
    for place in [*range(4, 100), *range(100, len(data), 37)]:
        shard.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        opened = Corpus.open(tmp_path / "out")
        assert opened.window(TRAIN, 0) == expected[0]
        try:
            found = [opened.window(TRAIN, index) for index in range(first, first + num_windows)]
        except FailedPreconditionError as error:
            assert str(shard) in str(error)
            refused += 1
        else:  # a byte of a column that no window reads
            assert found == expected[first : first + num_windows]
    assert refused > 90


def test_a_shard_that_is_short_missing_or_another_is_refused_and_made_again(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    corpus = sharded(tmp_path / "out")
    names = [shard["file"] for shard in corpus.record["splits"][TRAIN]["shards"]]
    paths = [tmp_path / "out" / "windows" / name for name in names]
    whole = {path: path.read_bytes() for path in paths}
    last = corpus.num_windows(TRAIN) - 1

    def refused(match: str) -> None:
        with pytest.raises(FailedPreconditionError, match=f"{names[-1]} {match}"):
            Corpus.open(tmp_path / "out").window(TRAIN, last)

    paths[-1].unlink()
    refused("is missing; prepare it again")
    assert windows(sharded(tmp_path / "out"), TRAIN) == windows(corpus, TRAIN)
    assert {path: path.read_bytes() for path in paths} == whole
    paths[-1].write_bytes(whole[paths[-1]][:-1])
    refused("is not the file that corpus.json describes")
    assert windows(sharded(tmp_path / "out"), TRAIN) == windows(corpus, TRAIN)
    shutil.copy(paths[0], paths[-1])
    refused("is not the file that corpus.json describes")


def test_a_new_plan_leaves_no_shard_of_the_old_one(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    sharded(tmp_path / "out")
    config = CorpusConfig(files=("in/*.txt",), window_bytes=256, train_bytes=3000)
    corpus = sharded(tmp_path / "out", config)
    kept = {shard["file"] for split in corpus.splits for shard in corpus.record["splits"][split]["shards"]}
    folder = tmp_path / "out" / "windows"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == kept


def test_the_fingerprint_is_over_contents_and_order(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    first = sharded(tmp_path / "one")
    assert sharded(tmp_path / "two").fingerprint(TRAIN) == first.fingerprint(TRAIN)
    (tmp_path / "in" / "000.txt").write_text(story(0).replace("word0x59", "word0x58"))
    second = sharded(tmp_path / "three")
    assert {second.fingerprint(s) for s in second.splits} != {first.fingerprint(s) for s in first.splits}
    other = CorpusConfig(files=("in/*.txt",), window_bytes=128, context_bytes=200)
    assert sharded(tmp_path / "four", other).fingerprint(TRAIN) != second.fingerprint(TRAIN)


def test_the_single_file_of_earlier_versions_is_read(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    corpus = sharded(tmp_path / "out")
    write_version_2(tmp_path / "old", corpus)
    old = Corpus.open(tmp_path / "old")
    for split in corpus.splits:
        assert windows(old, split) == windows(corpus, split)
        assert list(old.texts(split)) == list(corpus.texts(split))
        assert old.fingerprint(split) == f"of {split}"
    assert sharded(tmp_path / "old").fingerprint(TRAIN) == "of train", "a finished ledger is not prepared again"
    with (tmp_path / "old" / "windows.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"windows.parquet is not the file"):
        Corpus.open(tmp_path / "old")
    assert sharded(tmp_path / "old").fingerprint(TRAIN) == corpus.fingerprint(TRAIN)
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["corpus.json", "windows"]


def test_a_corpus_behind_a_url(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    here, there = sharded(tmp_path / "out"), sharded("memory://ledgers/mine")
    assert [windows(there, split) for split in there.splits] == [windows(here, split) for split in here.splits]
    opened = Corpus.open("memory://ledgers/mine")
    assert documents_of(opened, HELD_OUT) == documents_of(here, HELD_OUT)
    files = Files("memory://ledgers/mine")
    name = opened.record["splits"][HELD_OUT]["shards"][0]["file"]
    files.delete(f"windows/{name}")
    with pytest.raises(FailedPreconditionError, match=f"memory://ledgers/mine/windows/{name} is missing"):
        Corpus.open("memory://ledgers/mine").window(HELD_OUT, 0)
    assert sharded("memory://ledgers/mine").window(HELD_OUT, 0) == here.window(HELD_OUT, 0)
    with pytest.raises(ValueError, match=r"memory://nothing/corpus.json does not exist; prepare the corpus first"):
        Corpus.open("memory://nothing")
