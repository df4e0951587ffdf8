"""One live deployment for all tests that need it: real Ray, real Serve, real gRPC, one source on real vLLM.

The source `smollm2` is the real SmolLM2-135M-Instruct; `tiny` is a random model made here, which costs nothing to run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from services.common.cluster import Deployment, enable_ray_authentication, free_port
from services.common.models import MODELS, fetch
from services.distill.config import TargetConfig
from services.distill.target import prepare_target
from services.fusion.client import FusionClient
from services.recipes.recipe import Recipe, load_recipe

REAL_MODEL = "smollm2-135m-instruct"
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
]


@dataclass(frozen=True)
class Live:
    """What is up, and the recipe that it was made from."""

    recipe: Recipe
    recipe_file: Path
    deployment: Deployment

    @property
    def client(self) -> FusionClient:
        return FusionClient(self.deployment.grpc_address, patience_seconds=60)


def sentences(num_bytes: int, seed: int) -> str:
    """Plain text in sentences and paragraphs; a few characters take more than one byte."""
    rng, text = random.Random(seed), ""
    while len(text.encode()) < num_bytes:
        words = [rng.choice(WORDS) for _ in range(rng.randint(4, 14))]
        text += " ".join(words).capitalize() + rng.choice([". ", "! ", "? — ", ".\n", ' "ça va" 👍 '])
    return text


def make_tiny_model(folder: Path, *, vocabulary_size: int, seed: int) -> Path:
    """A random decoder of some thousand parameters with a tokenizer trained on generated text."""
    config = TargetConfig.model_validate(
        {
            "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
            "tokenizer": {"train": {"vocabulary_size": vocabulary_size}},
        }
    )
    return prepare_target(config, [sentences(20_000, seed)], folder, seed)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A FUSION_HOME of the tests' own, so that they neither see nor stop what else is up; fetched models are shared."""
    fetched = {name: fetch(name) for name in MODELS}
    before = os.environ.get("FUSION_HOME")
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    for name, folder in fetched.items():
        (home / "models" / name).symlink_to(folder)
    os.environ["FUSION_HOME"] = str(home)
    enable_ray_authentication()
    yield home
    os.environ.pop("FUSION_HOME")
    if before is not None:
        os.environ["FUSION_HOME"] = before


@pytest.fixture(scope="session")
def recipe_file(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with one real and one tiny source, and a corpus of generated documents."""
    folder = tmp_path_factory.mktemp("recipe")
    documents = folder / "documents"
    documents.mkdir()
    for number in range(24):
        (documents / f"{number:02}.txt").write_text(sentences(500, seed=number), encoding="utf-8")
    tiny = make_tiny_model(folder / "tiny", vocabulary_size=500, seed=1)
    recipe = {
        "name": "live",
        "output_dir": str(folder / "runs"),
        "corpus": {
            "name": "sentences",
            "files": [f"{documents}/*.txt"],
            "window_bytes": 256,
            "held_out_share": 0.2,
            "shared_run_bytes": None,
        },
        "sources": [
            {
                "name": "smollm2",
                "model": REAL_MODEL,
                "engine": "vllm",
                "dtype": "float32",
                "top_k": 16,
                "max_tokens": 255,
                "max_tokens_in_flight": 512,
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
                "engine_args": {"enforce_eager": True, "max_num_seqs": 4},
                "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            },
            {"name": "tiny", "model": str(tiny), "engine": "transformers", "top_k": 16, "torch_threads": 1},
        ],
        "target": {
            "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
            "tokenizer": {"train": {"vocabulary_size": 400}},
        },
        "fusion": {"strategy": "avg_ce", "k_out": 16, "min_sources": 2},
        "service": {
            "grpc_port": free_port(),
            "http_port": free_port(),
            "dashboard_port": free_port(),
            "max_text_bytes": 4096,
            "max_texts": 4,
        },
        "distill": {
            "lambda": 0.5,
            "epochs": 6,
            "batch_windows": 4,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 5,
            "device": "cpu",
            "torch_threads": 1,
        },
    }
    path = folder / "live.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def live(recipe_file: Path) -> Iterator[Live]:
    """`fusion up` on the recipe; down again at the end, whatever happened."""
    from services.recipes.deploy import up
    from services.recipes.prepare import prepare

    recipe = load_recipe(recipe_file)
    resolved = prepare(recipe)
    deployment = up(recipe, resolved, lambda states: None)
    try:
        yield Live(recipe, resolved, deployment)
    finally:
        deployment.stop()
        shutil.rmtree(recipe.run_folder, ignore_errors=True)
