"""`fusion validate`: find the mistakes of a recipe before anything is started."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.base.errors import SettingError
from services.base.home import expand_user
from services.corpus.cleaning.pipeline import check_inputs, require_extra
from services.corpus.readers import local_files
from services.distill.on_policy.prompts import PromptFiles
from services.models.catalogue import resolve_model
from services.recall.examples import read_examples
from services.recall.training_config import JudgeTrainingConfig
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve, resolve_sources
from services.recipes.tokenizers import tokenizer_problems
from services.reward.config import RewardConfig
from services.reward.pairs import read_pairs
from services.sample.prompts import read_prompts
from services.source.config import SourceConfig
from services.source.engines.mixtures import check_mixture


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError with a line per problem: missing models, files, engines and devices, unusable tokenizers."""
    problems = list(_problems(recipe))
    if problems:
        raise RecipeError("\n".join(problems))


def _problems(recipe: Recipe) -> Iterator[str]:
    try:
        resolve_sources(recipe)
    except RecipeError as error:
        yield str(error)
    yield from _source_problems(recipe)
    yield from _corpus_problems(recipe)
    if recipe.sample is not None:
        try:
            sum(1 for _ in read_prompts(recipe.sample.prompts))
        except ValueError as error:
            yield f"sample.{error}"
    if recipe.recall is not None and recipe.recall.judge is not None and recipe.recall.address is None:
        try:
            resolve_model(recipe.recall.judge)
        except ValueError as error:
            yield f"recall.judge: {error}"
    if recipe.recall is not None and recipe.recall.train is not None:
        yield from _judge_problems(recipe.recall.train)
    if recipe.reward is not None:
        yield from _reward_problems(recipe.reward)
    yield from _posttrain_problems(recipe)
    yield from _on_policy_problems(recipe)
    yield from _target_problems(recipe)
    yield from tokenizer_problems(recipe)
    if recipe.distill.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            yield "distill.device: cuda is asked for, but torch sees no CUDA device here; use auto or cpu"
    try:
        recipe.trackers.check()
    except SettingError as error:
        yield str(error)
    parent = recipe.run_folder
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        yield f"output_dir: cannot write to {parent}"


def _on_policy_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.distill.on_policy is None:
        return
    try:
        PromptFiles.read(recipe.distill.on_policy.prompts).check_template(recipe.target.chat_template)
    except SettingError as error:
        yield str(error)


def _judge_problems(train: JudgeTrainingConfig) -> Iterator[str]:
    try:
        resolve_model(train.encoder)
    except ValueError as error:
        yield f"recall.train.encoder: {error}"
    for key, files in (("files", train.files), ("held_out", train.held_out)):
        if files:
            try:
                read_examples([Path(file) for file in files], f"recall.train.{key}")
            except SettingError as error:
                yield str(error)


def _reward_problems(reward: RewardConfig) -> Iterator[str]:
    try:
        resolve_model(reward.start)
    except ValueError as error:
        yield f"reward.start: {error}"
    try:
        read_pairs(reward.data, reward.domains)
    except ValueError as error:
        yield f"reward.{error}"


def _posttrain_problems(recipe: Recipe) -> Iterator[str]:
    if (config := recipe.posttrain) is None:
        return
    from services.posttrain.chain import read_data

    try:
        read_data(config)
    except SettingError as error:
        yield f"posttrain.{error}"
    if config.start != "model" and not (recipe.run_folder / config.start / "run.json").is_file():
        try:
            resolve("posttrain.start", config.start)
        except RecipeError as error:
            yield str(error)


def _source_problems(recipe: Recipe) -> Iterator[str]:
    for index, source in enumerate(recipe.sources):
        if (
            isinstance(source, SourceConfig)
            and source.engine.kind == "vllm"
            and importlib.util.find_spec("vllm") is None
        ):
            yield f"sources.{index}.engine: vllm is not installed here; use transformers, or an address"
        elif isinstance(source, SourceConfig):
            try:
                check_mixture(source, resolve_model(source.model))
            except SettingError as error:
                yield f"sources.{index}.{error}"
            except ValueError:
                pass  # the model itself, which is named above


def _corpus_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.curate is not None:
        try:
            require_extra()
            check_inputs(recipe.curate)
        except ValueError as error:
            yield f"curate.{error}"
    if recipe.reads_curated:  # not there before `fusion corpus`
        return
    try:
        local_files(recipe.corpus.files or ())
    except ValueError as error:
        yield f"corpus.{error}"


def _target_problems(recipe: Recipe) -> Iterator[str]:
    target = recipe.target
    if target.model is not None:
        try:
            model = resolve_model(target.model)
        except ValueError as error:
            yield f"target.model: {error}"
        else:
            yield from _training_problems(recipe, model)
    if target.tokenizer is not None and target.tokenizer.folder is not None:
        folder = expand_user(target.tokenizer.folder, "target.tokenizer.folder")
        if not folder.is_dir():
            yield f"target.tokenizer: no folder {folder}"
    if target.model is None:
        yield from _training_problems(recipe, None)


def _training_problems(recipe: Recipe, folder: Path | None) -> Iterator[str]:
    """Yield what the target in a folder, or else the one from scratch, does not allow in section `distill`."""
    distill = recipe.distill
    raises_base = any(stage.rope_theta is not None for stage in distill.stages or ())
    if folder is not None and distill.moe is None and not raises_base:
        return
    from services.distill.target.moe import check_mixture
    from services.distill.target.rope import check_rope
    from services.models.weights import model_of

    try:
        config = _target_config(recipe, folder)
        if distill.moe is not None:
            check_mixture(config, distill.moe)
        if raises_base:
            check_rope(model_of(config))
    except (ValueError, OSError) as error:
        yield str(error)


def _target_config(recipe: Recipe, folder: Path | None) -> Any:
    """Return the target's configuration in transformers; raises ValueError or OSError."""
    from transformers import AutoConfig

    from services.distill.target.prepare import shape_of

    if folder is None:
        return shape_of(recipe.target)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
