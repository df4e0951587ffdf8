"""Corpora: cutting documents into windows, splitting without leaks, reading what users have, refusing what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from services.base.home import FetchError
from services.base.settings import explain
from services.corpus.config import CorpusConfig
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.corpus.split import run_hashes, sharing
from tests.corpus.documents import documents_of, prepare_corpus, story, write_stories

texts = st.text(st.sampled_from("ab é漢🙂\n\t"), max_size=400) | st.text(max_size=100)


@settings(deadline=None)
@given(st.lists(texts, max_size=4), st.lists(texts, max_size=4), st.integers(1, 12))
def test_sharing_finds_common_runs(ours: list[str], others: list[str], run_bytes: int) -> None:
    def runs(text: bytes) -> set[bytes]:
        spaces = b" \t\n\r\f\v"
        starts = (i for i, byte in enumerate(text) if byte not in spaces and (i == 0 or text[i - 1] in spaces))
        return {text[i : i + run_bytes] for i in starts if i + run_bytes <= len(text)}

    ours_bytes, others_bytes = [text.encode() for text in ours], [text.encode() for text in others]
    known = set().union(*map(runs, others_bytes))
    assert sharing(ours_bytes, others_bytes, run_bytes) == [bool(runs(text) & known) for text in ours_bytes]


def test_sharing_in_many_documents_is_what_comparing_every_hash_gives() -> None:
    """As it was first written: all hashes of a document against all that are held out."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(300)]
    docs = [" ".join(rng.choice(words, 80)).encode() for _ in range(600)]
    for number in range(0, 600, 7):  # some share a run with another, of just the length or one byte less
        docs[number] = docs[number][:100] + b" " + docs[(number * 3) % 600][50 : 50 + 40 + number % 2]
    ours, others = docs[60:], docs[:60]
    for run_bytes in (8, 40, 41, 5000):
        known = np.unique(np.concatenate([run_hashes(other, run_bytes) for other in others]))
        plain = [bool(np.isin(run_hashes(text, run_bytes), known).any()) for text in ours]
        assert sharing(ours, others, run_bytes) == plain
        assert run_bytes > 100 or sum(plain) > 0
    assert sharing(ours, [], 16) == [False] * len(ours)


def test_splits_are_whole_documents_and_disjoint(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    corpus = prepare_corpus(CorpusConfig(files=("in/*.txt",), window_bytes=256), tmp_path / "out")
    assert corpus.splits == (TRAIN, HELD_OUT)
    train, held_out = documents_of(corpus, TRAIN), documents_of(corpus, HELD_OUT)
    assert {**train, **held_out} == {f"{number:03}.txt": story(number).encode() for number in range(20)}
    assert not set(train) & set(held_out)
    assert 0.1 <= sum(map(len, held_out.values())) / sum(map(len, {**train, **held_out}.values())) < 0.2
    assert b"".join(corpus.texts(TRAIN)) == b"".join(train.values())
    assert corpus.num_bytes(TRAIN) == sum(map(len, train.values()))


def test_duplicates_go_and_shared_text_never_straddles_the_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_stories(tmp_path / "in", 30)
    repeated = "This sentence stands in a good many documents, because somebody has copied and pasted it everywhere."
    for number in range(0, 30, 3):
        (tmp_path / "in" / f"{number:03}.txt").write_text(f"{repeated} {story(number)}")
    for number in range(5):
        (tmp_path / "in" / f"copy{number}.txt").write_text(story(number * 3 + 1))
    config = CorpusConfig(files=("in/*.txt",), held_out_share=0.5, shared_run_bytes=64)
    with caplog.at_level(logging.WARNING):
        corpus = prepare_corpus(config, tmp_path / "out")
    assert corpus.record["num_documents"] == 30
    assert corpus.record["num_duplicates"] == 5
    assert repeated.encode() in b"".join(corpus.texts(HELD_OUT))
    assert repeated.encode() not in b"".join(corpus.texts(TRAIN))
    assert f"{corpus.record['num_dropped_as_shared']} of " in caplog.text
    everything = prepare_corpus(config.model_copy(update={"shared_run_bytes": None}), tmp_path / "out")
    assert repeated.encode() in b"".join(everything.texts(TRAIN))


def test_caps_keep_the_split(tmp_path: Path) -> None:
    write_stories(tmp_path / "in", 40)
    whole = prepare_corpus(CorpusConfig(files=("in/*.txt",), window_bytes=128), tmp_path / "whole")
    config = CorpusConfig(files=("in/*.txt",), window_bytes=128, train_bytes=3000, held_out_bytes=1000)
    capped = prepare_corpus(config, tmp_path / "capped")
    for split, cap in ((TRAIN, 3000), (HELD_OUT, 1000)):
        assert cap - 128 < capped.num_bytes(split) <= cap
        assert list(capped.texts(split)) == list(whole.texts(split))[: capped.num_windows(split)]


def test_preparing_again_does_nothing_until_something_changes(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    config = CorpusConfig(files=("in/*.txt",))
    first = prepare_corpus(config, tmp_path / "out")
    record = tmp_path / "out" / "corpus.json"
    written = record.stat().st_mtime_ns
    again = prepare_corpus(config, tmp_path / "out")
    assert record.stat().st_mtime_ns == written
    assert again.fingerprint(TRAIN) == first.fingerprint(TRAIN)

    other_seed = prepare_corpus(config.model_copy(update={"seed": 1}), tmp_path / "out")
    assert other_seed.fingerprint(TRAIN) != first.fingerprint(TRAIN)
    assert prepare_corpus(config, tmp_path / "out").fingerprint(TRAIN) == first.fingerprint(TRAIN)

    (tmp_path / "in" / "000.txt").write_text(story(1000))
    changed = prepare_corpus(config, tmp_path / "out")
    assert {changed.fingerprint(TRAIN), changed.fingerprint(HELD_OUT)} != {
        first.fingerprint(TRAIN),
        first.fingerprint(HELD_OUT),
    }


def test_the_fingerprint_does_not_depend_on_names_and_places(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    first = prepare_corpus(CorpusConfig(files=("in/*.txt",)), tmp_path / "one")
    (tmp_path / "moved").mkdir()
    for path in (tmp_path / "in").iterdir():
        path.rename(tmp_path / "moved" / f"z{path.stem[::-1]}.md")
    second = prepare_corpus(CorpusConfig(files=(str(tmp_path / "moved" / "*"),)), tmp_path / "two")
    assert [first.fingerprint(split) for split in first.splits] == [second.fingerprint(split) for split in first.splits]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    stories = [story(number) for number in range(10)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n\n" for text in stories))
    pq.write_table(pa.table({"body": stories, "other": range(10)}), tmp_path / "table.parquet")
    (tmp_path / "pieces.data").write_text("%%".join(stories))
    configs = [
        {"files": ["lines.jsonl"], "text_field": "body"},
        {"files": ["table.parquet"], "text_field": "body"},
        {"files": ["pieces.data"], "format": "text", "separator": "%%"},
    ]
    made = [
        prepare_corpus(CorpusConfig.model_validate(config), tmp_path / f"out{i}") for i, config in enumerate(configs)
    ]
    for corpus in made:
        found = {**documents_of(corpus, TRAIN), **documents_of(corpus, HELD_OUT)}
        assert sorted(found.values()) == sorted(text.encode() for text in stories)
    assert len({corpus.fingerprint(TRAIN) for corpus in made}) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"files": ["nothing/*.txt"]}, "files.0: no file matches 'nothing/*.txt'"),
        ({"files": ["good.txt", "nothing/*.txt"]}, "files.1: no file matches"),
        ({"files": ["blank.txt"]}, "files: there is no text in them"),
        ({"files": ["latin.txt"]}, "latin.txt: invalid UTF-8 at byte 3"),
        ({"files": ["good.txt"]}, "held_out_share: nothing is left for training, the text has 1 document(s)"),
        ({"files": ["good.data"]}, "good.data is none of .txt, .md, .rst, .jsonl, .parquet; set `format`"),
        ({"files": ["bad.jsonl"]}, "bad.jsonl: line 2 is not JSON"),
        ({"files": ["good.jsonl"]}, "text_field: "),
        ({"files": ["half.jsonl"]}, "half.jsonl: line 1 holds a lone surrogate"),
        ({"files": ["good.txt"], "format": "parquet"}, "good.txt: not a Parquet file"),
        ({"files": ["table.parquet"]}, "has no text column 'text'; its columns: number"),
        ({"files": ["*.md"], "train_bytes": 3}, "train_bytes: no window fits"),
        ({"files": ["*.md"], "held_out_bytes": 3}, "held_out_bytes: no window fits"),
    ],
)
def test_bad_input_names_key_and_place(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("one two three")
    (tmp_path / "good.data").write_text("one two three")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "good.jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "a.md").write_text(story(1))
    (tmp_path / "b.md").write_text(story(2))
    pq.write_table(pa.table({"number": [1]}), tmp_path / "table.parquet")
    with pytest.raises(ValueError) as raised:
        prepare_corpus(CorpusConfig.model_validate(config), tmp_path / "out")
    assert message in str(raised.value)
    assert not (tmp_path / "out" / "corpus.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give exactly one of `files` and `package`"),
        ({"files": []}, "files: "),
        ({"files": ["a"], "window_bytes": 0}, "window_bytes: "),
        ({"files": ["a"], "held_out_share": 1}, "held_out_share: "),
        ({"files": ["a"], "windows": 5}, "windows: unknown key"),
        ({"package": {"registry": "cpan", "name": "a", "version": "1", "glob": "*"}}, "package.registry: "),
        ({"package": {"registry": "npm", "name": "--help", "version": "1", "glob": "*"}}, "package.name: "),
    ],
)
def test_bad_settings_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CorpusConfig.model_validate(config)
    assert message in explain(raised.value)


def test_a_missing_or_damaged_corpus_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus.json does not exist; prepare the corpus first"):
        Corpus.open(tmp_path / "out")
    write_stories(tmp_path / "in")
    config = CorpusConfig(files=("in/*.txt",))
    corpus = prepare_corpus(config, tmp_path / "out")
    with pytest.raises(ValueError, match="no 'test', only train, held_out"):
        corpus.num_windows("test")
    with pytest.raises(IndexError):
        corpus.window(TRAIN, corpus.num_windows(TRAIN))
    (tmp_path / "out" / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        Corpus.open(tmp_path / "out")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_stories(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cannot write below"):
        prepare_corpus(CorpusConfig(files=("in/*.txt",)), tmp_path / "file" / "out")
