"""The steps together: every document is accounted for, runs repeat to the byte, and a killed run goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs

from services.base.errors import RunFailedError, SettingError
from services.base.files import open_location
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.published import check_curated, copy_documents
from services.corpus.cleaning.tasks import local_workers
from tests.corpus.cleaning.conftest import bytes_of, rows_of, run_clean, settings
from tests.fakes.heap.oracles import jaccard
from tests.fakes.heap.planted import SEVERE, Heap
from tests.fakes.services.s3_server import rights_on_prefix, s3_server, s3_url

Made = tuple[Heap, Path]


@pytest.fixture(scope="module")
def cleaned(heap: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("cleaned") / "curate"
    return run_clean(settings(heap[1]), out), out


def test_each_document_is_kept_or_dropped_once_with_a_reason(heap: Made, cleaned: Any) -> None:
    ledger, out = cleaned
    kept, dropped = rows_of(out, "documents/*.parquet"), rows_of(out, "*/*/dropped.parquet")
    assert Counter(row["id"] for row in kept + dropped) == Counter(list(heap[0].texts))
    assert ledger["documents_in"] == len(heap[0].texts) == ledger["kept"] + ledger["dropped"]
    assert (ledger["kept"], ledger["dropped"]) == (len(kept), len(dropped))
    by_reason = Counter(row["reason"] for row in dropped)
    assert sum((Counter(entry["dropped"]) for entry in ledger["steps"]), Counter()) == by_reason
    assert all(row["reason"] for row in dropped)
    assert ledger["bytes_in"] == sum(len(text.encode()) for text in heap[0].texts.values())
    for before, after in zip(ledger["steps"], ledger["steps"][1:], strict=False):
        assert before["kept"] == after["documents_in"]


def test_what_was_planted_goes_and_the_rest_stays(heap: Made, cleaned: Any) -> None:
    made, out = heap[0], cleaned[1]
    kept = {row["id"]: row["text"] for row in rows_of(out, "documents/*.parquet")}
    reasons = {row["id"]: row["reason"] for row in rows_of(out, "*/*/dropped.parquet")}
    assert {reasons.get(key) for key in made.profane} == {"severe_word"}
    assert not any(key in kept for key in made.boilerplate)
    assert {reasons.get(key) for key, _ in [*made.verbatim, *made.reworded, *made.partial]} == {"in_suite"}
    assert all(
        {reasons.get(copy), reasons.get(original)} & {"exact_copy", "near_copy"} for copy, original in made.exact
    )
    for copy, original, aimed in made.near:
        similarity = jaccard(made.texts[copy], made.texts[original])
        if aimed == 0.5:
            assert reasons.get(copy) != "near_copy", (copy, similarity)
        else:
            assert {copy, original} - set(kept), (copy, similarity)
    assert len(made.personal) == 6
    for key, datum in made.personal:
        assert datum in made.texts[key]
        assert datum not in kept[key]
    assert SEVERE not in " ".join(kept.values()).lower()
    untouched = set(made.texts) - made.planted()
    lost = {key for key in untouched if key not in kept and reasons[key] not in {"exact_copy", "near_copy"}}
    assert len(lost) <= len(untouched) // 10, {key: reasons[key] for key in lost}


def test_samples_show_dropped_text(heap: Made, cleaned: Any) -> None:
    samples = [
        (reason, sample)
        for entry in cleaned[0]["steps"]
        for reason, found in entry["samples"].items()
        for sample in found
    ]
    dropped = {row["id"]: row["reason"] for row in rows_of(cleaned[1], "*/*/dropped.parquet")}
    assert {reason for reason, _ in samples} == set(dropped.values())
    for reason, sample in samples:
        assert dropped[sample["id"]] == reason
        assert sample["text"] == heap[0].texts[sample["id"]][:600]


def test_two_runs_are_equal_to_the_byte(heap: Made, cleaned: Any, tmp_path: Path) -> None:
    run_clean(settings(heap[1], workers=1), tmp_path / "again")
    again, first = bytes_of(tmp_path / "again"), bytes_of(cleaned[1])
    assert again.keys() == first.keys()
    differing = [name for name in first if name != "ledger.json" and again[name] != first[name]]
    assert differing == []


def test_a_change_redoes_that_step_and_those_behind_it(heap: Made, tmp_path: Path) -> None:
    def made_at() -> dict[str, int]:
        return {path.parents[1].name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/00000/record.json")}

    run_clean(settings(heap[1]), tmp_path / "out")
    before = made_at()
    run_clean(settings(heap[1]), tmp_path / "out")
    assert made_at() == before
    run_clean(settings(heap[1], safety=None, near_duplicates={"threshold": 0.9}), tmp_path / "out")
    after = made_at()
    same = {name for name in after if after[name] == before.get(name)}
    assert same == {"read", "exact_hashes", "exact_search", "exact_duplicates", "language", "rules"}
    assert not (tmp_path / "out" / "safety").exists()
    assert any(row["id"] in dict(heap[0].personal) for row in rows_of(tmp_path / "out", "documents/*.parquet"))


def test_a_damaged_shard_is_made_again(heap: Made, cleaned: Any, tmp_path: Path) -> None:
    run_clean(settings(heap[1]), tmp_path / "out")
    for name in ("rules/00001/kept.parquet", "read/00000/record.json"):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:100])
    run_clean(settings(heap[1]), tmp_path / "out")
    first = bytes_of(cleaned[1])
    assert {name for name, data in bytes_of(tmp_path / "out").items() if first[name] != data} == set()


_PROGRAM = """
import sys
from pathlib import Path
from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.tasks import local_workers
if __name__ == "__main__":
    with local_workers(2) as run_all:
        config = CurateConfig.model_validate_json(sys.argv[1])
        clean(config, sys.argv[2], run_all, lambda *done: print(*done, flush=True))
"""


def kill_at(line: int, command: list[str]) -> list[psutil.Process]:
    """Start a program, kill it when it has printed so many lines, and return the workers that it had."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for _ in range(line):
            assert run.stdout.readline()
        children = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.stdout.close()
        assert run.wait() == -signal.SIGKILL
    return children


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(heap: Made, cleaned: Any, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    config = settings(heap[1]).model_dump_json()
    command = [sys.executable, str(program), config, str(tmp_path / "out")]
    workers = kill_at(random.Random(0).randint(5, 15), command)
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/record.json")}
    assert done
    kill_at(20, command)
    subprocess.run(command, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was done is not done again"
    assert bytes_of(tmp_path / "out") == bytes_of(cleaned[1])


def test_a_task_that_another_run_takes_away_is_named_and_not_left_out_of_the_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    off = {"exact_duplicates": False, "language": None, "rules": None, "near_duplicates": None, "safety": None}
    config = CurateConfig.model_validate({"files": [f"{tmp_path}/a.jsonl"], "shards": 1, **off})

    def take_away(step: str, done: int, num_tasks: int) -> None:
        if (step, done) == ("by_domain", num_tasks):
            (tmp_path / "out/read/00000/record.json").unlink()

    with local_workers(1) as run_all, pytest.raises(RunFailedError, match="out/read/00000 has changed while"):
        clean(config, tmp_path / "out", run_all, take_away)
    assert run_clean(config, tmp_path / "out")["kept"] == 1


def test_an_object_store_ends_with_the_same_objects_whatever_kills_the_run(
    heap: Made, cleaned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    with s3_server("bucket") as server, rights_on_prefix(server, "bucket", "team") as (address, refused):
        url = s3_url(address, "bucket/team/curate")
        command = [sys.executable, str(program), settings(heap[1]).model_dump_json(), url]
        kill_at(random.Random(1).randint(10, 20), command)
        with pytest.raises(SettingError, match="they are not cleaned yet"):
            check_curated(settings(heap[1]), url)
        subprocess.run(command, check=True, capture_output=True)
        files, root = open_location(url, "folder")
        infos = files.get_file_info(fs.FileSelector(root, recursive=True))
        found = {info.path[len(root) + 1 :]: files.open_input_file(info.path).read() for info in infos if info.is_file}
        assert found == bytes_of(cleaned[1])
        written = {info.path: info.mtime for info in infos}
        ledger = check_curated(settings(heap[1], workers=7), url)
        copy_documents(url, ledger["identity"], tmp_path / "here")
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "here").iterdir()}
        copy_documents(url, ledger["identity"], tmp_path / "there")
        assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "there").iterdir()}
        assert bytes_of(tmp_path / "here") == bytes_of(cleaned[1] / "documents")
        with pytest.raises(SettingError, match="their documents are not whole"):
            copy_documents(url, "another identity", tmp_path / "here")
        with local_workers(1) as run_all:
            changed = clean(settings(heap[1], safety=None), url, run_all)
        infos = files.get_file_info(fs.FileSelector(root, recursive=True))
        assert not any("/safety" in info.path for info in infos)
        assert all(written[info.path] == info.mtime for info in infos if "/near_duplicates/" in info.path)
        assert changed["identity"] != ledger["identity"]
        assert refused == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["/no/such/*.jsonl"]}, "files.0: no file matches"),
        ({"safety": {"severe_words": ["/no/words.txt"]}}, "safety.severe_words.0: no file matches"),
        ({"quality": {"good": ["/no/good.txt"], "bad": ["/no/bad.txt"]}}, "quality.good.0: no file matches"),
        ({"decontaminate": {"suites": ["/no/suite.jsonl"]}}, "decontaminate.suites.0: no file matches"),
        ({"text_field": "body", "files": ["{raw}/web/3.parquet"]}, "text_field: 3.parquet has no column 'body', only"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(
    heap: Made, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "files" in changes:
        changes["files"] = [name.format(raw=heap[1] / "raw") for name in changes["files"]]
    with pytest.raises(SettingError) as error:
        run_clean(settings(heap[1], **changes), tmp_path / "out")
    assert str(error.value).startswith(message)


def test_a_mistake_that_a_worker_finds_is_named(heap: Made, tmp_path: Path) -> None:
    config = settings(heap[1], files=[str(heap[1] / "raw/web/*.parquet")], text_field="body")
    with local_workers(2) as run_all, pytest.raises(SettingError, match=r"text_field: .* has no column 'body'"):
        clean(config, tmp_path / "out", run_all)


def test_a_heap_of_which_nothing_is_left_is_an_error_with_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(RunFailedError, match="none of 1 documents is left"):
        run_clean(CurateConfig(files=(str(tmp_path / "*.txt"),), shards=2), tmp_path / "out")
    assert '"dropped": 1' in (tmp_path / "out/ledger.json").read_text()


def test_what_was_cleaned_with_other_settings_is_not_taken_for_it(heap: Made, cleaned: Any, tmp_path: Path) -> None:
    check_curated(settings(heap[1], workers=7), cleaned[1])
    with pytest.raises(SettingError, match="near_duplicates: changed since"):
        check_curated(settings(heap[1], near_duplicates={"threshold": 0.8}), cleaned[1])
    with pytest.raises(SettingError, match="not cleaned yet"):
        check_curated(settings(heap[1]), tmp_path)


def test_rows_of_any_number_of_domains_lie_in_a_bounded_number_of_files(tmp_path: Path) -> None:
    rows = [{"text": f"A text of host {n}.", "domain": f"host{n}.example"} for n in range(100)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = dict.fromkeys(("language", "rules", "near_duplicates", "safety"))
    config = CurateConfig.model_validate({"files": [str(tmp_path / "in.jsonl")], "shards": 1, **left_out})
    run_clean(config, tmp_path / "out")
    assert len(list((tmp_path / "out" / "documents").glob("*.parquet"))) == 65
    kept = rows_of(tmp_path / "out", "documents/*.parquet")
    assert sorted(row["domain"] for row in kept) == sorted(row["domain"] for row in rows)
