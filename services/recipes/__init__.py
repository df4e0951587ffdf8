"""Recipes: one YAML file per run, and the ready ones that ship beside this module."""

from services.recipes.load import load_recipe
from services.recipes.recipe import Recipe, RecipeError

__all__ = ["Recipe", "RecipeError", "load_recipe"]
