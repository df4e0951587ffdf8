"""Finds the folders of the models that a recipe names."""

from __future__ import annotations

from pathlib import Path

from services.models.catalogue import resolve_model
from services.recipes.recipe import Recipe, RecipeError


def resolve_sources(recipe: Recipe) -> dict[str, Path]:
    """Return the folder of each source's model, which the fusion service needs for its tokenizer, by source.

    Raises RecipeError naming the key whose folder is not there.
    """
    return {
        source.name: resolve(f"sources[{index}].model", source.model) for index, source in enumerate(recipe.sources)
    }


def resolve(key: str, model: str) -> Path:
    """Return the folder of the model that a recipe names under `key`; raises RecipeError."""
    try:
        return resolve_model(model)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error
