"""The services that stream.py measures: synthetic sources and one fusion replica on a Ray cluster of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import psutil

from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import prepare
from services.deploy.local_ray import free_port
from services.deploy.serve_config import serve_config
from services.fusion.client import StreamRequest
from services.recipes.recipe import Recipe
from tests.fakes.services.local_serve import local_serve

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
TOP_K = 64
WINDOW_BYTES = 8192
"""About 2,048 tokens, which FuseLLM took."""
_EVER = 2**31
_DOCUMENTS = 16


@dataclass
class Served:
    """Services that are up on a cluster of their own."""

    recipe: Recipe
    address: str
    ray: psutil.Process

    @property
    def processes(self) -> dict[str, psutil.Process]:
        """The proxy and each application's one replica, by name."""
        found = {}
        for process in self.ray.children(recursive=True):
            title = " ".join(process.cmdline())
            if "ProxyActor" in title:
                found["proxy"] = process
            elif "ServeReplica:" in title:
                found[title.partition("ServeReplica:")[2].partition(":")[0]] = process
        return found


class Bench:
    """The folder for everything that is written, and the length of the measurements."""

    def __init__(self, folder: Path, models: Mapping[str, Path], quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self._models = models
        documents = folder / "documents"
        documents.mkdir()
        for number in range(_DOCUMENTS):  # long ones, so that few windows are cut short by a document's end
            text = "\n".join(list(topics.values())[number::_DOCUMENTS])
            (documents / f"{number}.txt").write_text(text, encoding="utf-8")

    @property
    def seconds(self) -> float:
        return 6.0 if self.quick else 30.0

    @contextmanager
    def served(
        self, num_sources: int, tokens_per_second: float | None, window_bytes: int = WINDOW_BYTES
    ) -> Iterator[Served]:
        """Serve `num_sources` sources and one replica of the fusion service."""
        recipe = self._recipe(num_sources, tokens_per_second, window_bytes)
        prepare(recipe)
        with local_serve(serve_config(recipe)) as ray:
            yield Served(recipe, recipe.fusion_address, ray)

    def _recipe(self, num_sources: int, tokens_per_second: float | None, window_bytes: int) -> Recipe:
        sources = [
            {
                "name": f"source{number}",
                "model": str(self._models[MODELS[number % len(MODELS)]]),
                "engine": "synthetic",
                "top_k": TOP_K,
                "synthetic": {"tokens_per_second": tokens_per_second, "seed": number},
            }
            for number in range(num_sources)
        ]
        values = {
            "name": "stream",
            "output_dir": str(self.folder / f"runs-{num_sources}-{window_bytes}"),
            "corpus": {
                "name": "python-docs",
                "files": [f"{self.folder}/documents/*.txt"],
                "window_bytes": window_bytes,
                "context_bytes": 0,
                "held_out_share": 0.02,
                "shared_run_bytes": None,
            },
            "sources": sources,
            "target": {
                "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
                "tokenizer": {"train": {"vocabulary_size": 4096}},
            },
            "fusion": {"strategy": "avg_ce", "k_out": TOP_K, "min_sources": num_sources},
            "service": {
                "grpc_port": free_port(),
                "http_port": free_port(),
                "store": None,
            },
        }
        return Recipe.model_validate(values)


def everything(served: Served) -> StreamRequest:
    target = Vocabulary.from_pretrained(served.recipe.target_folder).fingerprint
    return StreamRequest("python-docs", "train", seed=0, num_epochs=_EVER, expected_vocabulary=target)
