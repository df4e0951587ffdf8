"""The parts of the quickstart on a corpus of many shards: services, stream, training, evaluation, on S3 as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.base.progress_bars import plain_console
from services.corpus.ledger import TRAIN, Corpus
from services.deploy.local_ray import enable_ray_authentication, free_port
from services.evaluation.controls import CLM_ONLY, FUSED
from services.recipes.recipe import Recipe
from services.store.store import BlockStore
from tests.fakes.files.many_shards import many_shards
from tests.fakes.services.places import PLACES, Place, place_in
from tests.fakes.tiny_model import make_tiny_model, sentences

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place_in(request.param, tmp_path, monkeypatch) as opened:
        yield opened


def recipe_of(folder: Path, place: Place) -> Recipe:
    documents = folder / "documents"
    documents.mkdir()
    for number in range(24):
        (documents / f"{number:02}.txt").write_text(sentences(500, seed=number), encoding="utf-8")
    sources = [
        {
            "name": f"source-{number}",
            "model": str(make_tiny_model(folder / f"model-{number}", vocabulary_size=400 + 50 * number, seed=number)),
            "engine": "synthetic",
            "top_k": 8,
        }
        for number in range(2)
    ]
    small = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    return Recipe.model_validate(
        {
            "name": "shards",
            "output_dir": str(folder / "runs"),
            "corpus": {
                "name": "words",
                "files": [f"{documents}/*.txt"],
                "window_bytes": 128,
                "context_bytes": 64,
                "shared_run_bytes": None,
                "folder": place("corpus"),
            },
            "sources": sources,
            "target": {"config": small, "tokenizer": {"train": {"vocabulary_size": 300}}},
            "fusion": {"k_out": 8, "min_sources": 2},
            "service": {
                "grpc_port": free_port(),
                "http_port": free_port(),
                "dashboard_port": free_port(),
                "store": place("store"),
            },
            "distill": {"epochs": 1, "device": "cpu", "torch_threads": 1, "storage": place("checkpoints")},
        }
    )


def test_the_quickstart_runs_on_many_shards(place: Place, tmp_path: Path) -> None:
    enable_ray_authentication()
    from services.commands.quickstart import run

    recipe = recipe_of(tmp_path, place)
    with many_shards(1 << 11):
        summary = run(recipe, plain_console())
    corpus = Corpus.open(place("corpus"))
    assert len(corpus.record["splits"][TRAIN]["shards"]) > 2
    assert summary["windows"] == corpus.num_windows(TRAIN)
    assert set(summary["nats_per_byte"]) == {CLM_ONLY, FUSED, "source-0", "source-1"}
    assert len(BlockStore(place("store")).identities()) == 2
