"""The command line as a program of its own, and recipes with one key changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Fusion = Callable[..., "subprocess.CompletedProcess[str]"]
Written = Callable[[str, Any], str]


@pytest.fixture(scope="session")
def fusion() -> Fusion:
    """Runs `fusion` with arguments, and environment variables by keyword."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).parent / "fusion"), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "COLUMNS": "200", **env},
        )

    return run


@pytest.fixture
def written(recipe_file: Path, tmp_path: Path) -> Written:
    """Writes the recipe of the tests with one dotted key changed, and returns its path."""

    def write(key: str, value: Any) -> str:
        recipe = yaml.safe_load(recipe_file.read_text())
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            section = section[int(parent)] if parent.isdigit() else section.setdefault(parent, {})
        section[last] = value
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write
