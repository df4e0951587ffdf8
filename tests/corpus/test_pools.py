"""Pools: parts of the train documents, by length and domain, with windows of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from services.base.settings import explain
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.corpus.prepare import plan_corpus, read_text
from tests.corpus.documents import documents_of, story

DOMAINS = ("news", "code", "")


def write_records(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Write documents of several lengths and domains; return domain and text by name."""
    texts = [(DOMAINS[n % 3], story(n, 20 + 40 * (n % 4))) for n in range(40)]
    records = [{"text": text, **({"kind": domain} if domain else {})} for domain, text in texts]
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {f"in.jsonl#{n}": (domain, text.encode()) for n, (domain, text) in enumerate(texts)}


def prepare(folder: Path, **config: Any) -> Corpus:
    settings = {"files": ["in.jsonl"], "domain_field": "kind", "window_bytes": 128} | config
    return plan_corpus(read_text(CorpusConfig.model_validate(settings), folder, sizes=Sizes(shard=3000)))


def test_a_pool_holds_the_train_documents_that_fit_in_windows_of_its_own(tmp_path: Path) -> None:
    given = write_records(tmp_path)
    pools = {
        "short": {"max_document_bytes": 700},
        "long-news": {"min_document_bytes": 701, "domains": ["news"], "window_bytes": 1024},
        "plain": {"domains": ["code", ""]},
    }
    corpus = prepare(tmp_path / "out", pools=pools)
    assert corpus.splits == (TRAIN, HELD_OUT, "train/short", "train/long-news", "train/plain")
    train = documents_of(corpus, TRAIN)
    fits = {
        "train/short": lambda domain, text: len(text) <= 700,
        "train/long-news": lambda domain, text: len(text) > 700 and domain == "news",
        "train/plain": lambda domain, text: domain in ("code", ""),
    }
    for split, fit in fits.items():
        assert documents_of(corpus, split) == {n: text for n, text in train.items() if fit(given[n][0], text)}
        assert len(documents_of(corpus, split)) > 3
    longest = {split: max(map(len, corpus.texts(split))) for split in corpus.splits}
    assert longest[TRAIN] <= 128 and longest["train/short"] <= 128 and 512 < longest["train/long-news"] <= 1024
    without = prepare(tmp_path / "without")
    assert [without.fingerprint(s) for s in without.splits] == [corpus.fingerprint(s) for s in (TRAIN, HELD_OUT)]
    assert len({corpus.fingerprint(split) for split in corpus.splits}) == 5
    for split in corpus.splits:
        windows = [corpus.window(split, index) for index in range(corpus.num_windows(split))]
        assert [window.domain for window in windows] == [given[window.document][0] for window in windows]


def test_a_shard_says_domain_and_length_of_every_window_s_document(tmp_path: Path) -> None:
    given = write_records(tmp_path)
    corpus = prepare(tmp_path / "out")
    folder = tmp_path / "out" / "windows"
    rows = [row for split in corpus.splits for path in (folder / split).iterdir() for row in _rows(path)]
    assert {row["document"] for row in rows} == set(given)
    for row in rows:
        domain, text = given[row["document"]]
        assert (row["domain"], row["document_bytes"]) == (domain, len(text))


def _rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_domains_of_every_format(tmp_path: Path) -> None:
    given = write_records(tmp_path)
    table = {"text": [text for _, text in given.values()], "kind": [domain or None for domain, _ in given.values()]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    chats = [
        {"prompt": "Say it.", "completion": text.decode(), "kind": domain or None} for domain, text in given.values()
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    pools = {"news": {"domains": ["news"]}}
    lines, rows = (prepare(tmp_path / f"out-{name}", files=[name], pools=pools) for name in ("in.jsonl", "in.parquet"))
    assert lines.fingerprint("train/news") == rows.fingerprint("train/news") != lines.fingerprint(TRAIN)
    talks = [
        prepare(tmp_path / f"out-{name}", files=[name], pools=pools, format="conversations", window_bytes=2048)
        for name in ("chats.jsonl", "chats.parquet")
    ]
    assert talks[0].fingerprint("train/news") == talks[1].fingerprint("train/news") != talks[0].fingerprint(TRAIN)
    news = {text for domain, text in given.values() if domain == "news"}
    assert set(talks[0].texts("train/news")) == set(talks[0].texts(TRAIN)) & news


def test_the_cap_of_train_is_that_of_every_pool(tmp_path: Path) -> None:
    write_records(tmp_path)
    corpus = prepare(tmp_path / "out", train_bytes=3000, pools={"news": {"domains": ["news"]}})
    for split in (TRAIN, "train/news"):
        assert 3000 - 128 < corpus.num_bytes(split) <= 3000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pools": {"a": {"min_document_bytes": 10**6}}}, "pools.a: no train document is of this length and domain"),
        ({"pools": {"a": {"domains": ["poems"]}}}, "pools.a: no train document is of this length and domain"),
        ({"domain_field": "topic"}, "domain_field: no record has 'topic'"),
    ],
)
def test_what_no_document_has_is_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_records(tmp_path)
    with pytest.raises(ValueError) as raised:
        prepare(tmp_path / "out", **config)
    assert message in str(raised.value)
    assert not (tmp_path / "out" / "corpus.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pools": {"a/b": {}}}, "pools.a/b"),
        ({"pools": {"a": {"min_bytes": 1}}}, "pools.a.min_bytes: unknown key"),
        ({"pools": {"a": {"min_document_bytes": 9, "max_document_bytes": 8}}}, "max_document_bytes: 8 is less than"),
        ({"pools": {"a": {"domains": ["x"]}}}, "pools.a.domains: needs `domain_field`"),
    ],
)
def test_bad_settings_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CorpusConfig.model_validate({"files": ["a"]} | config)
    assert message in explain(raised.value)
