"""The runs of the gain benchmark: the product's own trainer on blocks that lie in memory; every run is kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.blocks import Block
from fusion_core.fusion import FusionConfig
from fusion_core.vocabulary import Vocabulary
from services.base.home import exclusive
from services.commands.prepare import corpus_and_target
from services.corpus.ledger import HELD_OUT, TRAIN, Window
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.evaluation.nats_per_byte import Scores, nats_per_byte
from services.jobs.step_log import read_rows
from services.models.catalogue import resolve_model
from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from tests.bench.parts.gain_blocks import (
    BlocksInMemory,
    Fusing,
    capture,
    rows_with_distribution,
    score,
    token_blocks,
    vocabulary_of,
)

VALIDATION = "validation"
CLM_ONLY, MIN_EDIT, TRANSPORT = "CLM only", "min_edit", "transport"
BYTE = {"smollm2": "SmolLM2 alone", "gemma3": "Gemma alone"}
"""`byte` from a single source."""
FUSED = {
    f"byte, {strategy}, {scope}": FusionConfig.model_validate({"strategy": strategy, "scope": scope, "min_sources": 2})
    for strategy in ("avg_ce", "min_ce")
    for scope in ("window", "span")
}
METHODS = (CLM_ONLY, BYTE["gemma3"], "byte, avg_ce, window", MIN_EDIT, *list(FUSED)[1:], TRANSPORT)
LORA = {"LoRA, CLM only": 1.0, "LoRA, Gemma": 0.5}
"""The runs with a pretrained target, with their lambda."""
LAMBDA, LAMBDA_OF_PUBLISHED = 0.1, 0.4
"""The better settings of those in `TRIED`, for `byte`, and for `min_edit` and `transport`."""
TRIED: tuple[tuple[str, Mapping[str, float]], ...] = (
    (CLM_ONLY, {"learning_rate": 1e-3}),
    (CLM_ONLY, {}),
    ("byte, avg_ce, window", {"lambda": 0.1}),
    ("byte, avg_ce, window", {"lambda": 0.3}),
    (MIN_EDIT, {"lambda": 0.1}),
    (MIN_EDIT, {"lambda": 0.4}),
)
"""Runs with seed 0 whose scores on the validation part settled learning rate and lambda."""


@dataclass(frozen=True)
class Size:
    """Sizes of the benchmark.

    Attributes:
        train_bytes, held_out_bytes: caps of the two splits.
        num_validation: documents of the held-out split that settings were chosen on; they are not reported.
        shape, vocabulary_size: of the target from scratch.
        lora_windows, lora_held_out: windows that the pretrained target is trained and scored on, the first ones.
    """

    name: str
    train_bytes: int
    held_out_bytes: int | None
    num_validation: int
    shape: Mapping[str, int]
    vocabulary_size: int
    epochs: int
    num_seeds: int
    lora_windows: int
    lora_held_out: int


_SHAPE = {"hidden_size": 192, "num_layers": 4, "num_heads": 4, "intermediate_size": 512}
_TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128}
FULL = Size("gain", 200_000, None, 25, _SHAPE, 4096, epochs=4, num_seeds=3, lora_windows=80, lora_held_out=44)
QUICK = Size("gain-quick", 12_000, 8_000, 2, _TINY, 512, epochs=2, num_seeds=1, lora_windows=0, lora_held_out=0)


def recipe_of(size: Size) -> Recipe:
    """The quickstart's corpus and sources, the latter on engine `transformers`."""
    quickstart = load_recipe("quickstart")
    kept = {"name", "model", "top_k", "bos_token", "max_tokens"}
    return Recipe.model_validate(
        {
            "name": size.name,
            "output_dir": "runs/bench",
            "corpus": quickstart.corpus.model_dump()
            | {"train_bytes": size.train_bytes, "held_out_bytes": size.held_out_bytes, "held_out_share": 0.25},
            "sources": [
                source.model_dump(include=kept) | {"engine": "transformers", "dtype": "float32", "torch_threads": 1}
                for source in quickstart.sources
            ],
            "target": {
                "config": {**size.shape, "max_positions": 1024},
                "tokenizer": {"train": {"vocabulary_size": size.vocabulary_size}},
            },
        }
    )


class Runs:
    """Trains and scores one target; a run that was finished with the same settings is read from disk."""

    def __init__(
        self, folder: Path, vocabulary: Vocabulary, validation: Sequence[Window], held_out: Sequence[Window]
    ) -> None:
        """`validation` is scored at the end of training, as the trainer does it, `held_out` behind it, as eval does."""
        self.folder, self._vocabulary = folder, vocabulary
        self._validation, self._texts = token_blocks(vocabulary, validation), [window.text for window in held_out]

    def run(
        self,
        name: str,
        target: Path,
        config: DistillConfig,
        windows: Sequence[Window],
        blocks: Callable[[], Sequence[Block]],
        made_from: str,
    ) -> Any:
        """Nats of every held-out window (`nats_W`) and figures of the run; `model` is where the model lies.

        `blocks` fuses the windows, and `made_from` names how, so that one run can be told from another.
        """
        settings = {
            "name": name,
            "target": hashlib.sha256((target / "target.json").read_bytes()).hexdigest(),
            "config": config.model_dump(mode="json"),
            "texts": hashlib.sha256(b"\0".join([*self._texts, *(w.text for w in windows)])).hexdigest(),
            "made_from": made_from,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        run_folder = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-seed{config.seed}-{key}"
        with exclusive(run_folder):
            result_file = run_folder / "result.json"
            if not result_file.is_file():
                shutil.rmtree(run_folder, ignore_errors=True)
                run_folder.mkdir(parents=True)
                result = self._train(DistillJob(name, run_folder, target, "gain", TRAIN, "", config), blocks())
                result_file.write_text(json.dumps({"settings": settings, **result}, indent=1))
        return json.loads(result_file.read_text())

    def _train(self, job: DistillJob, blocks: Sequence[Block]) -> dict[str, Any]:
        job = replace(job, eval_split=VALIDATION)
        fusion = BlocksInMemory(self._vocabulary, {TRAIN: blocks, VALIDATION: self._validation})
        position = DistillWorker(job, make_plan(job, fusion), fusion, World()).run()
        rows = read_rows(job.files.metrics)
        return {
            "model": str(job.files.model),
            "tokens": position.tokens,
            "steps": position.step,
            "seconds": sum(row["step_seconds"] for row in rows),
            "clm_at_end": float(np.mean([row["clm"] for row in rows[-20:]])),
            "rows_with_distribution": rows_with_distribution(blocks),
            "validation": [row["nats_per_byte"] for row in read_rows(job.files.evaluations)],
            "nats_W": self.score(job.files.model).nats_W.tolist(),
        }

    def score(self, model: Path) -> Scores:
        """A model on the held-out windows."""
        return nats_per_byte(model, self._texts, torch_threads=1)


class Experiment:
    """Corpus, captured rows and runs of one size."""

    def __init__(self, size: Size) -> None:
        self.size, self.recipe = size, recipe_of(size)
        corpus = corpus_and_target(self.recipe)
        self.train, held_out = (
            [corpus.window(split, index) for index in range(corpus.num_windows(split))] for split in (TRAIN, HELD_OUT)
        )
        validation = list(dict.fromkeys(window.document for window in held_out))[: size.num_validation]
        self.validation = [window for window in held_out if window.document in validation]
        self.held_out = [window for window in held_out if window.document not in validation]
        self.vocabulary = Vocabulary.from_pretrained(self.recipe.target_folder)
        self._runs = Runs(self.recipe.run_folder / "runs", self.vocabulary, self.validation, self.held_out)

    @cached_property
    def captured(self) -> dict[str, list[Block]]:
        """Every source's block of every train window."""
        store = str(self.recipe.run_folder / "store")
        return {source.name: capture(source, self.train, store) for source in self.recipe.sources}

    def held_out_documents(self, num_windows: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the document, bytes) of each of the first held-out windows."""
        windows = self.held_out[:num_windows]
        documents = list(dict.fromkeys(window.document for window in windows))
        return (
            np.array([documents.index(window.document) for window in windows]),
            np.array([len(window.text) for window in windows]),
        )

    def run(self, method: str, seed: int, **changes: Any) -> Any:
        """Trains the target from scratch with a method; `changes` to the settings are for choosing them."""
        lambda_ = LAMBDA_OF_PUBLISHED if method in {MIN_EDIT, TRANSPORT} else LAMBDA
        config = self._config(1.0 if method == CLM_ONLY else lambda_, seed, changes)
        made_from = f"{method}, top_k {self.recipe.sources[0].top_k}"
        return self._runs.run(
            method,
            self._target(seed),
            config,
            self.train,
            lambda: self._blocks(method, seed if method == TRANSPORT else 0),
            made_from,
        )

    def _config(self, lambda_: float, seed: int, changes: dict[str, Any]) -> DistillConfig:
        steps_per_epoch = -(-len(self.train) // 4)
        settings = {
            "lambda": lambda_, "epochs": self.size.epochs, "batch_windows": 4, "learning_rate": 2e-3,
            "warmup_share": 0.05, "seed": seed, "checkpoint_every_steps": 10**6, "device": "cpu", "torch_threads": 1,
            "eval_every_steps": steps_per_epoch,
        }  # fmt: skip
        return DistillConfig.model_validate(settings | changes)

    def _target(self, seed: int) -> Path:
        """The target before training: the same tokenizer, weights of the seed."""
        first = self.recipe.target_folder
        if seed == self.recipe.distill.seed:
            return first
        config = self.recipe.target.model_dump() | {"tokenizer": {"folder": str(first)}}
        return prepare_target(TargetConfig.model_validate(config), (), first.with_name(f"target-seed{seed}"), seed)

    @lru_cache(maxsize=2)  # noqa: B019 - an experiment lives as long as its process
    def _blocks(self, method: str, seed: int) -> list[Block]:
        if method == CLM_ONLY:
            return token_blocks(self.vocabulary, self.train)
        if method == MIN_EDIT:
            return self._fusing.min_edit()
        if method == TRANSPORT:
            return self._fusing.transport(self._own_rows(seed))
        if method in FUSED:
            return self._fusing.byte(list(self.captured), FUSED[method])
        return self._fusing.byte([name for name, single in BYTE.items() if single == method], FusionConfig())

    @cached_property
    def _fusing(self) -> Fusing:
        return Fusing(self.vocabulary, self._source_vocabularies(), self.train, self.captured)

    def _source_vocabularies(self) -> dict[str, Vocabulary]:
        return {source.name: vocabulary_of(source) for source in self.recipe.sources}

    def _own_rows(self, seed: int) -> list[Block]:
        """Return the rows of the CLM-only target with the same seed over the train windows."""
        model = self.run(CLM_ONLY, seed)["model"]
        source = SourceConfig(name="target", model=model, engine="transformers", dtype="float32", torch_threads=1)
        vocabulary = vocabulary_of(source)
        assert vocabulary.bos_id is not None
        return list(score(source, vocabulary, vocabulary.bos_id, self.train))

    def untouched(self) -> Any:
        """The pretrained target as it is."""
        folder, runs = self._pretrained()
        settings = {"config": {"lambda_": None}}
        nats_W = runs.score(folder).nats_W.tolist()
        return {"settings": settings, "nats_W": nats_W, "rows_with_distribution": None, "tokens": 0}

    def lora_run(self, name: str, **changes: Any) -> Any:
        """Trains adapters on SmolLM2, by Gemma's rows or by nobody's."""
        folder, runs = self._pretrained()
        settings = {"epochs": 1, "learning_rate": 2e-4, "lora": {"rank": 16, "alpha": 32}, "micro_batch_windows": 1}
        config = self._config(LORA[name], 0, settings | {"eval_every_steps": None} | changes)
        windows = self.train[: self.size.lora_windows]
        target = Vocabulary.from_pretrained(folder)
        if config.tokens_only:
            return runs.run(name, folder, config, windows, lambda: token_blocks(target, windows), "tokens")

        def blocks() -> list[Block]:
            captured = {"gemma3": self.captured["gemma3"][: len(windows)]}
            return Fusing(target, self._source_vocabularies(), windows, captured).byte(["gemma3"], FusionConfig())

        return runs.run(name, folder, config, windows, blocks, "gemma3, byte")

    def _pretrained(self) -> tuple[Path, Runs]:
        model = str(resolve_model(self.recipe.sources[0].model))
        target = TargetConfig.model_validate({"model": model})
        folder = prepare_target(target, (), self.recipe.run_folder / "target-pretrained", 0)
        vocabulary = Vocabulary.from_pretrained(folder)
        held_out = self.held_out[: self.size.lora_held_out]
        return folder, Runs(self.recipe.run_folder / "runs", vocabulary, self.validation, held_out)
