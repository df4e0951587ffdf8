"""The work of a forked process in the tests of `fusion sample`; imported before the fork with all that takes long."""

from __future__ import annotations

from transformers import AutoTokenizer  # noqa: F401  # what reading a vocabulary imports

from services.base.progress_bars import plain_console
from services.commands.answers.sample import Sample
from services.recipes.load import load_recipe


def begin(recipe: str) -> None:
    Sample(load_recipe(recipe)).run(plain_console(quiet=True))
