"""The runs: one text of five domains, each source's rows captured once, a small target taught by every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig
from fusion_core.fusion.headroom import Segments, best_mixture, common_segments
from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import HELD_OUT, TRAIN
from services.distill.config import DistillConfig
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from tests.bench.mixed.texts import write_documents
from tests.bench.parts.gain_blocks import Fusing, capture, token_blocks, vocabulary_of
from tests.bench.parts.gain_runs import LAMBDA, Runs

CLM_ONLY, SOFTENED = "CLM only", "best source, softened by 0.8"
ALONE = {"smollm2": "SmolLM2 alone", "gemma3": "Gemma alone"}
DEFAULT = "avg_ce"
_EQUAL = dict.fromkeys(ALONE, 1.0)
FUSED: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "avg_ce, tau 0.2, k_out 64": {"tau": 0.2, "k_out": 64},
    "fixed 0.5, k_out 64": {"strategy": "fixed", "weights": _EQUAL, "k_out": 64},
    "online": {"strategy": "online"},
}
"""Section `fusion` of each method of both sources; `online` gets the prior that is fitted on the train windows."""
METHODS = (CLM_ONLY, *ALONE.values(), *FUSED, SOFTENED)


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment; `bytes_per_domain` counts both splits."""

    name: str
    bytes_per_domain: int
    shape: dict[str, int]
    vocabulary_size: int
    epochs: int
    num_seeds: int


_SHAPE = {"hidden_size": 192, "num_layers": 4, "num_heads": 4, "intermediate_size": 512}
_TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128}
FULL = Size("mixed", 60_000, _SHAPE, 4096, epochs=4, num_seeds=3)
QUICK = Size("mixed-quick", 24_000, _TINY, 512, epochs=8, num_seeds=3)


def quickstart_sources() -> list[dict[str, Any]]:
    kept = {"name", "model", "top_k", "bos_token", "max_tokens"}
    return [source.model_dump(include=kept) for source in load_recipe("quickstart").sources]


def recipe_of(size: Size, root: Path, sources: Sequence[Mapping[str, Any]]) -> Recipe:
    """Return the recipe of the mixed text, with the sources on engine `transformers`."""
    documents = write_documents(root / f"{size.name}-documents.jsonl", size.bytes_per_domain)
    return Recipe.model_validate(
        {
            "name": size.name,
            "output_dir": str(root),
            "corpus": {
                "name": "mixed", "files": [str(documents.absolute())], "domain_field": "domain",
                "held_out_share": 0.4, "context_bytes": 0,
            },
            "sources": [
                {**source, "engine": "transformers", "dtype": "float32", "torch_threads": 1} for source in sources
            ],
            "target": {
                "config": {**size.shape, "max_positions": 1024},
                "tokenizer": {"train": {"vocabulary_size": size.vocabulary_size}},
            },
        }
    )  # fmt: skip


class Experiment:
    """Corpus, captured rows and runs of one size; the sources are called as in `ALONE`."""

    def __init__(self, size: Size, root: Path, sources: Sequence[Mapping[str, Any]]) -> None:
        self.size, self.recipe = size, recipe_of(size, root, sources)
        corpus = corpus_and_target(self.recipe)
        self.train, self.held_out = (
            [corpus.window(split, index) for index in range(corpus.num_windows(split))] for split in (TRAIN, HELD_OUT)
        )
        self.vocabulary = Vocabulary.from_pretrained(self.recipe.target_folder)
        self._runs = Runs(self.recipe.run_folder / "runs", self.vocabulary, self.held_out[:1], self.held_out)

    @cached_property
    def captured(self) -> dict[str, list[Block]]:
        """Every source's block of every train window."""
        store = str(self.recipe.run_folder / "store")
        return {source.name: capture(source, self.train, store) for source in self.recipe.sources}

    @cached_property
    def segments(self) -> list[Segments]:
        """By train window, the bytes between common ends of the sources' tokens."""
        return [common_segments(blocks) for blocks in zip(*self.captured.values(), strict=True)]

    @cached_property
    def best(self) -> str:
        """The source that loses least on the train windows."""
        return min(
            self.captured, key=lambda name: -sum(float(b.without_end().gold_T.sum()) for b in self.captured[name])
        )

    def fusion(self, method: str) -> tuple[list[str], FusionConfig]:
        """Return the sources of a method, and how they are fused."""
        if method == SOFTENED:
            return [self.best], FusionConfig(soften=0.8)
        if method in FUSED:
            values = dict(FUSED[method])
            if values.get("strategy") == "online":
                weight_S = best_mixture(Segments.joined(self.segments)).weight_S
                values["prior"] = dict(zip(self.captured, np.maximum(weight_S, 0.001).round(3).tolist(), strict=True))
            return list(self.captured), FusionConfig.model_validate(values)
        return [name for name, alone in ALONE.items() if alone == method], FusionConfig()

    def blocks(self, method: str) -> list[Block]:
        """Return the fused block of every train window."""
        if method == CLM_ONLY:
            return token_blocks(self.vocabulary, self.train)
        return self._fusing.byte(*self.fusion(method))

    @cached_property
    def _fusing(self) -> Fusing:
        vocabularies = {source.name: vocabulary_of(source) for source in self.recipe.sources}
        return Fusing(self.vocabulary, vocabularies, self.train, self.captured)

    def run(self, method: str, seed: int) -> Any:
        """Train the target with a method; weights and order of windows are of the seed."""
        settings = {
            "lambda": 1.0 if method == CLM_ONLY else LAMBDA, "epochs": self.size.epochs, "batch_windows": 4,
            "learning_rate": 2e-3, "warmup_share": 0.05, "seed": seed, "checkpoint_every_steps": 10**6,
            "device": "cpu", "torch_threads": 1,
        }  # fmt: skip
        made_from = "tokens" if method == CLM_ONLY else str([self.fusion(method), self.recipe.sources[0].top_k])
        config = DistillConfig.model_validate(settings)
        return self._runs.run(method, self._target(seed), config, self.train, lambda: self.blocks(method), made_from)

    def _target(self, seed: int) -> Path:
        config = self.recipe.target.model_dump() | {"tokenizer": {"folder": str(self.recipe.target_folder)}}
        folder = self.recipe.run_folder / f"target-seed{seed}"
        return prepare_target(TargetConfig.model_validate(config), (), folder, seed)
