"""Do experts help? A dense target goes on as it is, or as a mixture with or without balance; equal tokens, 3 seeds.

The start of every run is a small dense target from scratch that SmolLM2-135M-Instruct and Gemma-3-270M have taught for
a while. Text, rows and order of windows are the same for all. What is scored are documents that no run has seen;
intervals are those of `tests.bench.gain`. Finished runs are kept below runs/bench/moe, so what broke off goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig
from fusion_core.vocabulary import Vocabulary
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import HELD_OUT, TRAIN, Window
from services.distill.config import DistillConfig
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from tests.bench.gain import add_rows, interval
from tests.bench.moe.specialisation import Routing, routing_of
from tests.bench.moe.two_domains import domain_of, write_documents
from tests.bench.parts.gain_blocks import Fusing, capture, vocabulary_of
from tests.bench.parts.gain_runs import Runs
from tests.bench.parts.report import Report

DENSE, START = "dense", "start"
_SHAPE = {"shards": 8, "shared": 2, "copies": 4}
MIXTURES: dict[str, dict[str, Any]] = {
    f"{init}, {'balanced' if weight else 'no balance'}": _SHAPE | {"init": init, "balance": {"expert": weight}}
    for init, weight in product(("split", "residual"), (0.01, 0.0))
}
"""`distill.moe` of the runs with experts. A token of `split` meets as many weights as one of the dense target."""


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment; epochs of the dense start, and of each run behind it."""

    name: str
    bytes_per_domain: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    vocabulary_size: int
    start_epochs: int
    epochs: int
    num_seeds: int


FULL = Size("moe", 66_000, 192, 4, 512, 2048, start_epochs=6, epochs=4, num_seeds=3)
QUICK = Size("moe-quick", 12_000, 64, 2, 128, 512, start_epochs=1, epochs=1, num_seeds=1)
_ROOT = Path("runs/bench")


def recipe_of(size: Size, documents: Path) -> Recipe:
    """Return the recipe of the text of both domains, with the quickstart's sources on engine `transformers`."""
    kept = {"name", "model", "top_k", "bos_token", "max_tokens"}
    shape = {"hidden_size": size.hidden_size, "num_layers": size.num_layers, "num_heads": 4}
    return Recipe.model_validate(
        {
            "name": size.name,
            "output_dir": str(_ROOT),
            "corpus": {
                "name": "two-domains", "files": [str(documents.absolute())], "domain_field": "domain",
                "held_out_share": 0.4, "context_bytes": 0,
            },
            "sources": [
                source.model_dump(include=kept) | {"engine": "transformers", "dtype": "float32", "torch_threads": 1}
                for source in load_recipe("quickstart").sources
            ],
            "target": {
                "config": {**shape, "intermediate_size": size.intermediate_size, "max_positions": 1024},
                "tokenizer": {"train": {"vocabulary_size": size.vocabulary_size}},
            },
        }
    )  # fmt: skip


class Experiment:
    """Corpus, captured rows and runs."""

    def __init__(self, size: Size) -> None:
        self.size = size
        documents = write_documents(_ROOT / f"{size.name}-documents.jsonl", size.bytes_per_domain)
        self._domains = domain_of(documents)
        self.recipe = recipe_of(size, documents)
        corpus = corpus_and_target(self.recipe)
        self.train, self.held_out = (
            [corpus.window(split, index) for index in range(corpus.num_windows(split))] for split in (TRAIN, HELD_OUT)
        )
        self.vocabulary = Vocabulary.from_pretrained(self.recipe.target_folder)
        self._runs = Runs(self.recipe.run_folder / "runs", self.vocabulary, self.held_out[:1], self.held_out)

    def domain(self, window: Window) -> str:
        return next(domain for text, domain in self._domains.items() if window.text in text)

    def held_out_documents(self, num_windows: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the document, bytes) of each of the first held-out windows."""
        windows = self.held_out[:num_windows]
        documents = list(dict.fromkeys(window.document for window in windows))
        return (
            np.array([documents.index(window.document) for window in windows]),
            np.array([len(window.text) for window in windows]),
        )

    @cached_property
    def blocks(self) -> list[Block]:
        """The fused block of every train window."""
        store = str(self.recipe.run_folder / "store")
        captured = {source.name: capture(source, self.train, store) for source in self.recipe.sources}
        vocabularies = {source.name: vocabulary_of(source) for source in self.recipe.sources}
        return Fusing(self.vocabulary, vocabularies, self.train, captured).byte(
            list(captured), FusionConfig(min_sources=2)
        )

    def start(self, seed: int) -> Any:
        """Train the dense target from scratch."""
        config = self.recipe.target.model_dump() | {"tokenizer": {"folder": str(self.recipe.target_folder)}}
        folder = self.recipe.run_folder / f"target-seed{seed}"
        target = prepare_target(TargetConfig.model_validate(config), (), folder, seed)
        return self._run(START, target, seed, epochs=self.size.start_epochs, learning_rate=2e-3)

    def run(self, variant: str, seed: int) -> Any:
        """Train the dense target on, as it is or as a mixture."""
        started = TargetConfig(model=self.start(seed)["model"])
        target = prepare_target(started, (), self.recipe.run_folder / f"started-seed{seed}", seed)
        changes: dict[str, Any] = {"epochs": self.size.epochs, "learning_rate": 1e-3}
        return self._run(variant, target, seed, **changes, moe=MIXTURES.get(variant))

    def _run(self, name: str, target: Path, seed: int, **changes: Any) -> Any:
        settings = {
            "lambda": 0.1, "batch_windows": 2, "warmup_share": 0.05, "seed": seed, "checkpoint_every_steps": 10**6,
            "device": "cpu", "torch_threads": 1,
        }  # fmt: skip
        config = DistillConfig.model_validate(settings | changes)
        return self._runs.run(name, target, config, self.train, lambda: self.blocks, "both sources, byte")


def measure_experiment(report: Report, *, quick: bool) -> None:
    """Train what is missing, two runs at a time, and add losses, differences and routing."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    experiment = _experiment(quick)
    assert experiment.blocks  # captured before the workers start
    seeds = range(experiment.size.num_seeds)
    variants = (DENSE, *MIXTURES)
    tasks = [(quick, variant, seed) for seed in seeds for variant in (START, *variants)]
    with ProcessPoolExecutor(2, get_context("spawn"), _one_thread) as pool:
        runs = {task[1:]: run for task, run in zip(tasks, pool.map(_train, tasks), strict=True)}
    results = {variant: [runs[variant, seed] for seed in seeds] for variant in (START, *variants)}
    drawn = add_rows(report, "experiment", results, experiment, (DENSE,))  # type: ignore[arg-type]
    document_W, _ = experiment.held_out_documents(len(experiment.held_out))
    for variant in MIXTURES:
        _, low, _ = interval(drawn[variant] - drawn[DENSE], int(document_W.max()) + 1)
        if low is not None:
            report.check(f"{variant} minus dense, lower end of the interval", low, "nats/byte", at_most=0.0)
    _add_routing(report, experiment, {variant: results[variant] for variant in MIXTURES})


def _add_routing(report: Report, experiment: Experiment, results: Mapping[str, list[Any]]) -> None:
    """Add load and specialisation; checks that balance halves the deviation of the loads."""
    domains = [experiment.domain(window) for window in experiment.held_out]
    load_cv = {}
    for variant, runs in results.items():
        found: list[Routing] = [routing_of(Path(run["model"]), experiment.held_out, domains) for run in runs]
        load_cv[variant] = float(np.mean([one.load_cv for one in found]))
        report.row(
            table="experiment: routing",
            method=variant,
            load_cv=load_cv[variant],
            dead_experts=float(np.mean([one.dead_experts for one in found])),
            information_on_domain_nats=float(np.mean([one.information for one in found])),
            shuffled_nats=float(np.mean([one.shuffled for one in found])),
            shuffled_95_percent=float(np.mean([one.shuffled_high for one in found])),
        )
    for init in ("split", "residual"):
        ratio = load_cv[f"{init}, balanced"] / load_cv[f"{init}, no balance"]
        report.check(f"load CV with balance to that without, {init}", ratio, "", at_most=0.5)


def _one_thread() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)


def _train(task: tuple[bool, str, int]) -> Any:
    quick, variant, seed = task
    experiment = _experiment(quick)
    return experiment.start(seed) if variant == START else experiment.run(variant, seed)


@cache
def _experiment(quick: bool) -> Experiment:
    return Experiment(QUICK if quick else FULL)
