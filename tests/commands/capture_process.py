"""What a forked process does in the tests of `fusion capture`; imported before the fork with all that takes long."""

from __future__ import annotations

from rich.console import Console
from transformers import AutoTokenizer  # noqa: F401  # what reading a vocabulary imports

from services.commands.capture import Capture
from services.recipes.load import load_recipe


def begin(recipe: str, windows_per_shard: int) -> None:
    Capture(load_recipe(recipe), windows_per_shard=windows_per_shard).run(Console(quiet=True))
