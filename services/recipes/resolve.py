"""The folders of the models that a recipe names."""

from __future__ import annotations

from pathlib import Path

from services.models.catalogue import MODELS, resolve_model
from services.models.reference import is_reference
from services.recipes.recipe import Recipe, RecipeError


def resolve_sources(recipe: Recipe) -> dict[str, Path]:
    """Return the folder of each source's model, which the fusion service needs for its tokenizer, by source.

    Raises RecipeError naming the key whose folder is not there.
    """
    return {source.name: resolve(f"sources.{index}.model", source.model) for index, source in enumerate(recipe.sources)}


def models_to_fetch(recipe: Recipe) -> list[str]:
    """Return the models of a recipe that are fetched before they are used: of the catalogue, or named by a URL."""
    named = [source.model for source in recipe.sources]
    if recipe.target.model is not None:
        named.append(recipe.target.model)
    if recipe.recall is not None and recipe.recall.judge is not None:
        named.append(recipe.recall.judge)
    return [name for name in dict.fromkeys(named) if name in MODELS or is_reference(name)]


def resolve(key: str, model: str) -> Path:
    """Return the folder of the model that a recipe names under `key`; raises RecipeError."""
    try:
        return resolve_model(model)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error
