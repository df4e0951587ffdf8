"""A curriculum from a real fusion service over synthetic sources: windows of a corpus' pools, killed and resumed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.base.settings import explain
from services.corpus.ledger import TRAIN, Corpus
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.fusion.client import FusedWindow, FusionClient, SkippedWindow, StreamRequest
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from services.recipes.recipe import Recipe
from tests.fakes.services.plain_fusion import plain_fusion
from tests.fakes.tiny_model import sentences
from tests.fakes.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

POOLS = {"short": {"max_document_bytes": 700}, "long": {"min_document_bytes": 1000, "window_bytes": 384}}
STAGES = [
    {"name": "short", "share": 0.4, "mixture": {"short": 1}},
    {"name": "half", "share": 0.4, "mixture": {"train": 0.5, "long": 0.5}},
    {"name": "rest", "share": 0.2, "mixture": {"long": 1}, "rope_theta": 40_000},
]
TRAINING = {
    "lambda": 0.5, "stages": STAGES, "num_windows": 50, "batch_windows": 4, "checkpoint_every_steps": 3,
    "learning_rate": 1e-3, "k": 4,
}  # fmt: skip


class DeadlyClient(FusionClient):
    """Kills this process, as the kernel would, where the second stage reaches its twentieth window."""

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow | SkippedWindow]:
        for window in super().stream(request, prefetch_windows=prefetch_windows):
            if (window.cursor.epoch, window.cursor.dealt + window.cursor.received) == (1, 20):
                os.kill(os.getpid(), signal.SIGKILL)
            yield window


def killed(job: DistillJob) -> None:
    train(job, DeadlyClient(job.fusion_address))


def test_killed_in_its_second_stage_a_run_has_the_ledger_of_an_undisturbed_one(tmp_path: Path) -> None:
    documents = [sentences(500 if number % 2 else 1500, seed=number) for number in range(24)]
    with plain_fusion(tmp_path, documents=documents, windows={"pools": POOLS}) as fusion:

        def job(name: str) -> DistillJob:
            config = DistillConfig.model_validate(TRAINING)
            return DistillJob(
                name, tmp_path / name, fusion.recipe.target_folder, "words", TRAIN, fusion.address, config
            )

        undisturbed, disturbed = job("undisturbed"), job("disturbed")
        train(undisturbed, fusion.client())
        attempt = multiprocessing.get_context("spawn").Process(target=killed, args=(disturbed,))
        attempt.start()
        attempt.join(180)
        assert attempt.exitcode == -signal.SIGKILL
        newest = newest_complete(disturbed.checkpoints)
        assert newest is not None and 5 < newest.step < 10
        train(disturbed, fusion.client())
        corpus = Corpus.open(fusion.recipe.corpus_folder)
    ledger = read_rows(undisturbed.files.ledger)
    assert read_rows(disturbed.files.ledger) == ledger
    counts = [Counter[str]() for _ in STAGES]
    for row in ledger:
        for split, indices in row["windows"].items():
            counts[row["epoch"]][split] += len(indices)
            assert max(indices) < corpus.num_windows(split)
    assert counts == [{"train/short": 20}, {TRAIN: 10, "train/long": 10}, {"train/long": 10}]
    assert all(row["fusion"] is not None for row in read_rows(undisturbed.files.metrics))


def test_a_recipe_names_the_pool_that_is_not_there(tmp_path: Path) -> None:
    recipe = {
        "name": "staged",
        "corpus": {"files": ["*.txt"], "pools": {"long": {"min_document_bytes": 1000}}},
        "sources": [{"name": "one", "model": "smollm2-135m-instruct", "engine": "synthetic"}],
        "target": {"config": {}, "tokenizer": {"train": {"vocabulary_size": 300}}},
        "distill": {"stages": [{"name": "only", "share": 1, "mixture": {"long": 0.5, "train": 0.5}}]},
    }
    assert Recipe.model_validate(recipe).distill.stages is not None
    for pools, mixture, problem in (
        (recipe["corpus"]["pools"], {"long": 0.5, "code": 0.5}, r"distill.stages.0.mixture: no pool is called code"),
        ({"train": {}}, {"train": 1}, "corpus.pools: train is the whole split in distill.stages"),
    ):
        recipe["corpus"]["pools"], recipe["distill"]["stages"][0]["mixture"] = pools, mixture
        with pytest.raises(ValidationError) as caught:
            Recipe.model_validate(recipe)
        assert problem in explain(caught.value)
