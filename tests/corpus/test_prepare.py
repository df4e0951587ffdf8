"""Preparing on disk and in several processes: the same ledger as the plain definition of the draw gives."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.base.errors import SettingError
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.ledger import HELD_OUT, TRAIN, Corpus
from services.corpus.prepare import WindowTokenizer, plan_corpus, read_text
from services.corpus.split import RunTable, sharing
from tests.corpus.documents import documents_of, story
from tests.fakes.tokenizers import vocabulary

SMALL = Sizes(run=1500, bucket=2500, shard=4000)
"""Runs, buckets and shards of a few documents each."""
STOPPED = """
import sys
from services.base.files import Files
from services.corpus.config import CorpusConfig
from services.corpus.drawn import Sizes
from services.corpus.prepare import plan_corpus, read_text
from services.corpus.runs import Runs

def stop_after(function):
    def stopping(*values):
        function(*values)
        if moment != "writing" or values[1].endswith("00001.parquet"):
            print("here", flush=True)
            sys.stdin.read()
    return stopping

moment = sys.argv[1]
if moment == "reading":
    Runs._write_run = stop_after(Runs._write_run)
if moment == "writing":
    Files.write = stop_after(Files.write)
config = CorpusConfig(files=("in/*",), window_bytes=256)
text = read_text(config, "out", sizes=Sizes(run=1500, bucket=2500, shard=4000))
plan_corpus(text)
"""
"""A process that prepares a corpus, and waits in the middle of it."""


def write_files(folder: Path) -> dict[str, str]:
    """Write documents in all formats, some of them twice, some with a passage of another; return text by name."""
    rng, texts = random.Random(0), {}
    folder.mkdir()
    passage = story(999, 12).strip()
    for number in range(90):
        text = story(number, rng.randint(5, 120))
        texts[number] = f"{passage} {text}" if number % 10 == 3 else text
    lines = [json.dumps({"text": texts[n]}) for n in (*range(40), *range(5))]
    (folder / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    pq.write_table(pa.table({"text": [texts[n] for n in range(38, 70)]}), folder / "b.parquet")
    for number in range(68, 90):
        (folder / f"c{number}.txt").write_text(texts[number])
    names = {f"a.jsonl#{2 * n}": texts[n] for n in range(40)}
    names |= {f"b.parquet#{n - 38}": texts[n] for n in range(40, 70)}
    return names | {f"c{n}.txt": texts[n] for n in range(70, 90)}


def drawn(named: dict[str, str], config: CorpusConfig) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """Return train and held-out documents in order, and the number of dropped ones, as `CorpusConfig` defines them."""
    unique = {name: text.encode() for name, text in named.items()}
    order = sorted(unique, key=lambda name: hashlib.sha256(f"{config.seed}\0".encode() + unique[name]).digest())
    ends = list(accumulate(len(unique[name]) for name in order))
    num_held_out = 1 + sum(end < config.held_out_share * ends[-1] for end in ends)
    held_out, train = order[:num_held_out], order[num_held_out:]
    shared = sharing([unique[n] for n in train], [unique[n] for n in held_out], config.shared_run_bytes or 10**6)
    kept = [name for name, is_shared in zip(train, shared, strict=True) if not is_shared]
    return {n: unique[n] for n in kept}, {n: unique[n] for n in held_out}, len(train) - len(kept)


def ledger(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_documents_are_those_of_the_definition_in_its_order(tmp_path: Path) -> None:
    named = write_files(tmp_path / "in")
    config = CorpusConfig(files=("in/*",), window_bytes=256, held_out_share=0.3, shared_run_bytes=50)
    train, held_out, num_dropped = drawn(named, config)
    assert num_dropped > 0
    text = read_text(config, tmp_path / "out", sizes=SMALL)
    assert [each.encode() for each in text.train_texts()] == list(train.values())
    corpus = plan_corpus(text)
    for split, expected in ((TRAIN, train), (HELD_OUT, held_out)):
        found = documents_of(corpus, split)
        assert list(found.items()) == list(expected.items())
        assert len(corpus.record["splits"][split]["shards"]) > 1
    record = corpus.record
    numbers = [record[key] for key in ("num_documents", "num_duplicates", "num_dropped_as_shared")]
    assert numbers == [90, 5 + 2 + 2, num_dropped]
    del text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["in", "out"], "the text is gone"


def test_the_ledger_does_not_depend_on_processes_runs_and_buckets(tmp_path: Path) -> None:
    write_files(tmp_path / "in")
    pools = {"long": {"min_document_bytes": 700, "window_bytes": 512}}
    values = {"files": ("in/*",), "window_bytes": 256, "shared_run_bytes": 50, "train_bytes": 14_000, "pools": pools}
    sizes = {
        "one": (1, Sizes(shard=4000)),
        "two": (2, SMALL),
        "three": (1, Sizes(run=5000, bucket=900, shard=4000)),
    }
    tokenizer = WindowTokenizer("byte_level", "byte_level", lambda: vocabulary("byte_level"), max_tokens=90)
    for name, (workers, size) in sizes.items():
        config = CorpusConfig.model_validate({**values, "workers": workers})
        plan_corpus(read_text(config, tmp_path / name, sizes=size), [tokenizer])
    one, two, three = (ledger(tmp_path / name) for name in sizes)
    assert one == two == three
    assert len(one) > 8
    corpus = Corpus.open(tmp_path / "two")
    assert 14_000 - 256 < corpus.num_bytes(TRAIN) <= 14_000 < sum(map(len, documents_of(corpus, TRAIN).values())) + 256


def test_mistakes_and_warnings_of_other_processes_are_told_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path / "in")
    (tmp_path / "in" / "bad.jsonl").write_text('{"body": 1}\n')
    config = CorpusConfig(files=("in/*",), workers=2, window_bytes=256)
    with pytest.raises(SettingError, match=r"text_field: .*bad.jsonl, line 1 has no text under 'text'"):
        read_text(config, tmp_path / "out", sizes=SMALL)
    (tmp_path / "in" / "bad.jsonl").unlink()
    chats = [{"prompt": "x", "completion": story(n, 4 if n % 3 else 900)} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    talk = CorpusConfig.model_validate({"files": ["chats.jsonl"], "format": "conversations", "workers": 2})
    with caplog.at_level(logging.WARNING):
        corpus = plan_corpus(read_text(talk, tmp_path / "talk", sizes=SMALL))
    assert "is too long and is left out" in caplog.text
    left_out = sum(corpus.record["splits"][split]["turns"]["left_out"]["too_long"] for split in corpus.splits)
    assert left_out == 14


def test_hashes_in_files_are_found_like_hashes_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.corpus.split._RANGE_HASHES", 50)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64, endpoint=False)
    hashes[:2] = 0, 2**64 - 1
    parts = [hashes[:150], hashes[100:101], hashes[400:], hashes[120:]]
    files = [tmp_path / f"{number}" for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        file.write_bytes(np.sort(part).tobytes())
    RunTable.merge(files, tmp_path)
    found = RunTable.open(tmp_path)
    assert all(found.holds(hashes[n : n + 1]) for n in range(400))
    others = hashes ^ np.uint64(1)
    assert [found.holds(others[n : n + 1]) for n in range(400)] == np.isin(others, hashes).tolist()
    RunTable.merge([files[2]], tmp_path)
    assert not RunTable.open(tmp_path).holds(hashes)


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_killed_while_preparing_and_started_again(tmp_path: Path, moment: str) -> None:
    """Whatever a killed process leaves, the next one makes the same ledger and cleans up."""
    write_files(tmp_path / "in")
    config = CorpusConfig(files=("in/*",), window_bytes=256)
    plan_corpus(read_text(config, tmp_path / "undisturbed", sizes=SMALL))
    plan_corpus(read_text(config.model_copy(update={"seed": 3}), tmp_path / "out", sizes=SMALL))
    command = [sys.executable, "-c", STOPPED, moment]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.kill()
    assert [path for path in tmp_path.glob(".out-documents.*") if path.is_dir()]
    if moment == "writing":
        with pytest.raises(ValueError, match=r"corpus.json does not exist; prepare the corpus first"):
            Corpus.open(tmp_path / "out")
    plan_corpus(read_text(config, tmp_path / "out", sizes=SMALL))
    assert ledger(tmp_path / "out") == ledger(tmp_path / "undisturbed")
    assert not [path for path in tmp_path.glob(".out-documents.*") if path.is_dir()]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    program = """
import os, sys
from services.base.processes import Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        print(*set(workers.in_order(os.getpid, [() for _ in range(8)])), flush=True)
        sys.stdin.read()
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        started = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert started
        process.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]
