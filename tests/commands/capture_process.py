"""The work of a forked process in the tests of `fusion capture`; imported before the fork with all that takes long."""

from __future__ import annotations

from transformers import AutoTokenizer  # noqa: F401  # what reading a vocabulary imports

from services.base.progress_bars import plain_console
from services.commands.capture import Capture
from services.commands.capture_scope import open_scope
from services.recipes.load import load_recipe


def begin(recipe: str, windows_per_shard: int) -> None:
    scope = open_scope(load_recipe(recipe))
    Capture(scope, windows_per_shard=windows_per_shard).run(plain_console(quiet=True))
