"""A recipe that cannot work is refused before anything starts: exit code 2, and one line per mistake that names it."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.fusion.config import ServiceConfig
from services.recipes.load import load_recipe, shipped_recipes
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.validate import check_recipe
from tests.cli.conftest import Fusion, Written
from tests.fakes.files.tiny_mixtures import write_mixture

pytestmark = pytest.mark.timeout(900)


def test_validate_accepts_what_is_good(fusion: Fusion, recipe_file: Path) -> None:
    done = fusion("validate", str(recipe_file))
    assert done.returncode == 0, done.stderr
    assert "2 sources" in done.stdout


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_good(name: str) -> None:
    assert load_recipe(name).name == name


BAD_RECIPES = [
    ("colour", "red", "colour: unknown key"),
    ("fusion.strategy", "best", "fusion.strategy: Input should be 'min_ce', 'avg_ce', 'fixed' or 'online'"),
    ("fusion.tau", 0, "fusion.tau: "),
    ("fusion.alignment", "bytes", "fusion.alignment: Input tag 'bytes' found using 'method' does not match"),
    ("fusion.alignment", "transport", "fusion.alignment: transport matches candidates with those of a source"),
    ("fusion.min_sources", 3, "fusion.min_sources: must be at most the number of sources, 2, got 3"),
    ("distill.lambda", 1.5, "distill.lambda: Input should be less than or equal to 1"),
    ("sources.1.name", "smollm2", "the name smollm2 is used twice"),
    ("sources.0.model", "/no/such/folder", "sources.0.model: "),
    ("distill.lora", {"rank": 4}, "distill.lora: adapters need a pretrained target (target.model)"),
    ("distill.lambda", -0.1, "distill.lambda: Input should be greater than or equal to 0"),
    ("distill.sources", ["tiny", "gemma"], "distill.sources: no source is called gemma; there are smollm2, tiny"),
    (
        "sources.0.engine",
        "tgi",
        "sources.0.engine: Input should be 'vllm', 'transformers', 'synthetic' or 'openai' (given: 'tgi')",
    ),
    ("sources.0.top_k", 0, "sources.0.top_k: "),
    ("sources.0.max_top_k", 3, "max_top_k (3) must be at least top_k (16)"),
    ("service.grpc_port", 70000, "service.grpc_port: "),
    ("service.dashboard_port", 12345, "service.dashboard_port: 10002 to 19999 are the ports of Ray's workers"),
    ("corpus.window_bytes", 8192, "corpus.window_bytes: 8192 is more than service.max_text_bytes = 4096"),
    ("target.tokenizer", "/no/such/folder", "target.tokenizer: no folder /no/such/folder"),
    ("fusion", {"strategy": "fixed", "weights": {"tiny": 1}}, "fusion.weights: no weight for source smollm2"),
    ("fusion", {"strategy": "online", "prior": {"tiny": 1}}, "fusion.prior: none for source smollm2"),
    (
        "distill",
        {"loss": "jsd", "on_policy": {"prompts": ["/no/such.jsonl"], "rounds": 1, "round_steps": 1}},
        "distill.on_policy.prompts: no file matches '/no/such.jsonl'",
    ),
    pytest.param(
        "distill.device",
        "cuda",
        "distill.device: cuda is asked for, but torch sees no CUDA device",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"),
    ),
    (
        "distill.stages",
        [{"name": "all", "share": 1}],
        "distill.epochs: a run has either epochs or stages, got epochs = 6",
    ),
    ("tracking", ["aim"], "tracking.0: Input should be 'tensorboard', 'wandb' or 'mlflow' (given: 'aim')"),
    ("tracking", ["wandb", "wandb"], "tracking: names wandb twice"),
    ("distill.num_windows", 7, "distill.num_windows: only with stages"),
    ("distill.k", 17, "distill.k: 17 is more than fusion.k_out = 16"),
    ("corpus.files", ["/no/such/*.txt"], "corpus.files.0: no file matches"),
    ("corpus.name", "../elsewhere", "corpus.name: "),
    ("name", "../elsewhere", "name: "),
    ("distill.prefetch_windows", 2000, "distill.prefetch_windows: 2000 is more than service.per_client.blocks = 1024"),
    ("service.store", "s3://key:hush@bucket/x", "service.store: a s3:// URL with credentials in it is not allowed"),
    ("distill.storage", "s3://b?secret_key=hush", "distill.storage: a s3:// URL with credentials in it is not allowed"),
    ("distill.moe", {"shared": 8}, "distill.moe.shared: must be from 1 to shards - 1 = 7, got 8"),
    ("distill.moe", {"shards": 7}, "distill.moe: shards: must cut intermediate_size"),
    ("distill.moe", True, "distill.moe: must be a section of keys and values (given: True)"),
    (
        "target",
        {"architecture": {"model_type": "gpt2", "heads": 2}, "tokenizer": {"train": {"vocabulary_size": 512}}},
        "target.architecture.heads: the configuration of gpt2 has no such key",
    ),
    (
        "distill",
        {"stages": [{"name": "a", "share": 1, "mixture": {"long": 1}}]},
        "yaml: distill.stages.0.mixture: no pool is called long; there are train (see corpus.pools)\n",
    ),
    ("fusion.tau", float("inf"), ".inf is no finite number"),
    ("fusion.tau", "inf", "fusion.tau: Input should be a finite number"),
    ("sources.1.per_client.streams", 0, "sources.1.per_client.streams: "),
]


def test_a_floor_that_does_not_fit_the_number_of_sources_is_named() -> None:
    values = load_recipe("quickstart").model_dump(by_alias=True)
    values["fusion"]["min_weight"] = 0.5
    assert Recipe.model_validate(values).fusion.min_weight == 0.5
    values["sources"] = [*values["sources"], values["sources"][0] | {"name": "third"}]
    with pytest.raises(ValueError, match=r"fusion\.min_weight: must be at most 1 / 3 for 3 sources, got 0\.5"):
        Recipe.model_validate(values)


@pytest.mark.parametrize(("key", "value", "message"), BAD_RECIPES)
def test_validate_names_the_key(written: Written, key: str, value: Any, message: str) -> None:
    done = CliRunner().invoke(app, ["validate", written(key, value)], terminal_width=200)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert "hush" not in done.output


def test_a_target_from_scratch_without_rotary_embeddings_takes_no_base_of_them(recipe_file: Path) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["target"] = {"architecture": {"model_type": "gpt2"}, "tokenizer": {"train": {"vocabulary_size": 512}}}
    recipe["distill"] |= {"epochs": 1, "stages": [{"name": "long", "share": 1, "rope_theta": 1e6}]}
    with pytest.raises(RecipeError, match=r"^distill\.stages\.rope_theta: gpt2 has no rotary position embeddings"):
        check_recipe(Recipe.model_validate(recipe))


def test_one_wrong_entry_is_one_mistake(written: Written) -> None:
    done = CliRunner().invoke(app, ["validate", written("corpus.files", [1])], terminal_width=200)
    assert done.stderr.count("corpus.files") == 1


def test_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for content, message in ((None, "shipped recipes are"), ("{", "not YAML"), ("- a", "expected a mapping")):
        path = tmp_path / "recipe.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_set_changes_a_key_and_refuses_what_is_no_setting(fusion: Fusion, recipe_file: Path) -> None:
    assert load_recipe(recipe_file, {"distill.lambda": 1}).distill.lambda_ == 1
    done = fusion("validate", str(recipe_file), "--set", "distill.lambda")
    assert (done.returncode, "expected KEY=VALUE" in done.stderr) == (2, True)


def test_store_lies_in_the_run_folder_unless_told_otherwise(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.fusion_service().service.store == str(recipe.run_folder / "store")
    assert load_recipe(recipe_file, {"service.store": None}).fusion_service().service.store is None
    assert ServiceConfig().store == "store"


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_mixture_that_only_vllm_computes_wrongly_is_refused_for_it(
    recipe_file: Path, tmp_path: Path, kind: str
) -> None:
    recipe = yaml.safe_load(recipe_file.read_text())
    folder = write_mixture(tmp_path / "olmoe", "olmoe", norm_topk_prob=True)
    recipe["sources"][0] = {"name": "smollm2", "model": str(folder), "engine": kind, "top_k": 16}
    refused = f"sources.0.model: {folder}: norm_topk_prob: true in config.json: vLLM does not divide"
    with nullcontext() if kind == "transformers" else pytest.raises(RecipeError, match=f"^{re.escape(refused)}"):
        check_recipe(Recipe.model_validate(recipe))
