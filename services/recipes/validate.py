"""`fusion validate`: find the mistakes of a recipe before anything is started."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from services.base.home import expand_user
from services.corpus.cleaning.pipeline import check_inputs, require_extra
from services.corpus.readers import local_files
from services.models.catalogue import resolve_model
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.resolve import resolve_sources
from services.recipes.tokenizers import tokenizer_problems
from services.sample.prompts import read_prompts
from services.source.config import SourceConfig


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
    for index, source in enumerate(recipe.sources):
        if (
            isinstance(source, SourceConfig)
            and source.engine.kind == "vllm"
            and importlib.util.find_spec("vllm") is None
        ):
            yield f"sources[{index}].engine: vllm is not installed here; use transformers, or an address"
    yield from _corpus_problems(recipe)
    if recipe.sample is not None:
        try:
            sum(1 for _ in read_prompts(recipe.sample.prompts))
        except ValueError as error:
            yield f"sample.{error}"
    yield from _target_problems(recipe)
    yield from tokenizer_problems(recipe)
    if recipe.distill.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            yield "distill.device: cuda is asked for, but torch sees no CUDA device here; use auto or cpu"
    parent = recipe.run_folder
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        yield f"output_dir: cannot write to {parent}"


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
            yield from _moe_problems(recipe, model)
    if target.tokenizer is not None and target.tokenizer.folder is not None:
        folder = expand_user(target.tokenizer.folder, "target.tokenizer.folder")
        if not folder.is_dir():
            yield f"target.tokenizer: no folder {folder}"


def _moe_problems(recipe: Recipe, folder: Path) -> Iterator[str]:
    if recipe.distill.moe is None:
        return
    from services.distill.target.moe import check_moe

    try:
        check_moe(folder, recipe.distill.moe)
    except ValueError as error:
        yield str(error)
