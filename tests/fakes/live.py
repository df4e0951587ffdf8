"""One live deployment for all tests that need it: real Ray, real Serve, real gRPC, one source on real vLLM.

The source `smollm2` is the real SmolLM2-135M-Instruct; `tiny` is a random model made here, which costs nothing to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from services.deploy.local_ray import Deployment, free_port
from services.fusion.client import FusionClient
from services.recipes.recipe import Recipe
from tests.fakes.tiny_model import make_tiny_model, sentences

REAL_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Live:
    """The deployment that is up, and the recipe that it was made from."""

    recipe: Recipe
    recipe_file: Path
    deployment: Deployment

    @property
    def client(self) -> FusionClient:
        return FusionClient(self.deployment.grpc_address, patience_seconds=60)


def write_live_recipe(folder: Path) -> Path:
    """Write the recipe with one real and one tiny source and a corpus of generated documents; returns its file."""
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
            "context_bytes": 0,
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
