"""Two real sources, and a recipe of theirs with documents of two domains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from services.source.config import SourceConfig
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model, sentences

NOBODY = "127.0.0.1:9"


def write_recipe(folder: Path, models: dict[str, Path], addresses: dict[str, str]) -> str:
    documents = folder / "documents"
    documents.mkdir(exist_ok=True)
    lines = [
        json.dumps({"text": sentences(400, seed=number), "domain": "odd" if number % 2 else "even"})
        for number in range(40)
    ]
    (documents / "all.jsonl").write_text("\n".join(lines))
    recipe = {
        "name": "headroom",
        "output_dir": str(folder / "runs"),
        "corpus": {
            "files": [f"{documents}/*.jsonl"],
            "domain_field": "domain",
            "window_bytes": 200,
            "context_bytes": 0,
            "held_out_share": 0.5,
            "shared_run_bytes": None,
        },
        "sources": [
            {"name": name, "model": str(model), "top_k": 16, "address": addresses.get(name, NOBODY)}
            for name, model in models.items()
        ],
        "target": {"model": str(models["small"])},
        "fusion": {"k_out": 16},
        "distill": {"device": "cpu", "torch_threads": 1},
        "service": {"source_attempts": 1},
    }
    path = folder / "headroom.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "small": make_tiny_model(folder / "small", vocabulary_size=300, seed=1),
        "large": make_tiny_model(folder / "large", vocabulary_size=500, seed=2),
    }


@pytest.fixture(scope="session")
def addresses(models: dict[str, Path]) -> Iterator[dict[str, str]]:
    with ExitStack() as running:
        configs = [
            SourceConfig(name=name, model=str(model), engine="transformers", top_k=16, torch_threads=1)
            for name, model in models.items()
        ]
        yield {config.name: running.enter_context(plain_source(config)).address for config in configs}
