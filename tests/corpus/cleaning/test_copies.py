"""Copies: what is dropped has a near copy that stays, by the true Jaccard similarity of sets of 5-grams."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.corpus.cleaning.config import CurateConfig
from services.corpus.cleaning.steps.near_duplicates import bands_and_rows
from tests.corpus.cleaning.conftest import rows_of, run_clean
from tests.fakes.heap.oracles import jaccard
from tests.fakes.heap.planted import Heap, near_copy, write_heap


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    rng = random.Random(0)
    trials = 4000
    found = sum(any(all(rng.random() < threshold for _ in range(rows)) for _ in range(bands)) for _ in range(trials))
    assert found / trials >= 0.93
    assert bands * rows <= 144


def made_up(rng: random.Random, num_words: int) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(3, 9))) for _ in range(num_words))


def test_near_copies_go_and_mere_relatives_stay(tmp_path: Path) -> None:
    rng = random.Random(3)
    heap = Heap()
    for number in range(36):
        heap.texts[f"base-{number}"] = base = made_up(rng, 150)
        heap.texts[f"copy-{number}"] = near_copy(base, rng.choice([0.9, 0.8, 0.75]), rng)
        heap.texts[f"relative-{number}"] = near_copy(base, 0.45, rng)
    heap.texts |= {"short-1": "too short", "short-2": "too brief", "same-1": base, "same-2": f"\n{base} "}
    write_heap(heap, tmp_path)
    config = CurateConfig(files=(str(tmp_path / "raw/**/*"),), shards=3, language=None, rules=None, safety=None)
    run_clean(config, tmp_path / "out")
    kept = {row["id"]: row["text"] for row in rows_of(tmp_path / "out", "documents/*.parquet")}
    dropped = {row["id"]: row for row in rows_of(tmp_path / "out", "*/*/dropped.parquet")}
    exact = [key for key, row in dropped.items() if row["reason"] == "exact_copy"]
    assert len(exact) == 2
    assert set(exact) < {"base-35", "same-1", "same-2"}
    near = [key for key, row in dropped.items() if row["reason"] == "near_copy"]
    for key in near:
        closest = max(jaccard(heap.texts[key], text) for text in kept.values())
        assert closest >= 0.55, (key, closest)
    pairs = [(f"base-{n}", f"copy-{n}") for n in range(35)]
    alike = [pair for pair in pairs if jaccard(*(heap.texts[key] for key in pair)) >= 0.8]
    assert len(alike) >= 10
    assert [pair for pair in alike if set(pair) <= set(kept)] == []
    apart = [n for n in range(36) if jaccard(heap.texts[f"base-{n}"], heap.texts[f"relative-{n}"]) < 0.5]
    assert len(apart) >= 25
    assert [n for n in apart if f"relative-{n}" not in kept] == []
    assert {"short-1", "short-2"} <= set(kept)


def test_the_reason_names_the_document_that_stays(tmp_path: Path) -> None:
    heap = Heap(texts={"a": (text := made_up(random.Random(1), 80)), "b": near_copy(text, 0.9, random.Random(2))})
    write_heap(heap, tmp_path, num_files=1)
    config = CurateConfig(files=(str(tmp_path / "raw/**/*"),), shards=1, language=None, rules=None, safety=None)
    run_clean(config, tmp_path / "out")
    [dropped] = rows_of(tmp_path / "out", "*/*/dropped.parquet")
    assert dropped["detail"].startswith("of document 0 in shard 0, 0.")
    assert abs(float(dropped["detail"].split(", ")[1].split()[0]) - jaccard(*heap.texts.values())) < 0.12
