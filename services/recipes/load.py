"""Load a recipe from a file or by name, with changes from the command line."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.base.credentials import without_credentials
from services.base.settings import explain
from services.recipes.recipe import Recipe, RecipeError
from services.recipes.strict_yaml import StrictYamlError, read_yaml


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("services.recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe from a file, or a shipped one by name; `overrides` maps dotted keys to values.

    Raises RecipeError naming the file and key.
    """
    path = Path(name_or_path)
    if not path.is_file() and str(name_or_path) in shipped_recipes():
        text = (resources.files("services.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            shipped = ", ".join(shipped_recipes())
            raise RecipeError(f"{path}: cannot be read ({error}); shipped recipes are {shipped}") from error
    try:
        values = read_yaml(text)
    except StrictYamlError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping with the keys {', '.join(Recipe.model_fields)}")
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {line}" for line in explain(error).splitlines())) from error


def read_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of `--set KEY=VALUE` by dotted key; raises RecipeError for one that cannot be read."""
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {setting}: expected KEY=VALUE, such as distill.epochs=2")
        try:
            overrides[key] = read_yaml(value)
        except StrictYamlError as error:
            raise RecipeError(f"--set {without_credentials(setting)}: {error}") from error
    return overrides


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    section: Any = values
    for parent in parents:
        if isinstance(section, list) and parent.isdigit() and int(parent) < len(section):
            section = section[int(parent)]
        elif isinstance(section, dict):
            section = section.setdefault(parent, {})
        else:
            raise RecipeError(f"{key}: there is no {parent}")
    if not isinstance(section, dict):
        raise RecipeError(f"{key}: {last} is no key of a section")
    section[last] = value
