"""Settings that have to be made before anything else is imported, and the fixtures that many tests share.

Fixtures import what they need themselves: a test of pure code starts without Ray, torch and vLLM.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.fakes.live import Live

# Ray reads the mode once, when it is imported; clusters of the tests use Ray's token like those of `fusion up`.
os.environ.setdefault("RAY_AUTH_MODE", "token")

# Examples are random on a developer's machine and the same every time in CI; how long one takes is no verdict.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A FUSION_HOME of the tests' own, so that they neither see nor stop what else is up; fetched models are shared."""
    from services.deploy.local_ray import enable_ray_authentication
    from services.models.catalogue import MODELS
    from services.models.fetch import fetch

    fetched = {name: fetch(name) for name in MODELS}
    before = os.environ.get("FUSION_HOME")
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    for name, folder in fetched.items():
        (home / "models" / name).symlink_to(folder)
    os.environ["FUSION_HOME"] = str(home)
    enable_ray_authentication()
    yield home
    os.environ.pop("FUSION_HOME")
    if before is not None:
        os.environ["FUSION_HOME"] = before


@pytest.fixture(scope="session")
def recipe_file(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the live deployment."""
    from tests.fakes.live import write_live_recipe

    return write_live_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def live(recipe_file: Path) -> Iterator[Live]:
    """`fusion up` on the recipe; down again at the end, whatever happened."""
    from services.commands.prepare import prepare
    from services.deploy.up import up
    from services.recipes.load import load_recipe
    from tests.fakes.files.many_shards import many_shards
    from tests.fakes.live import Live

    recipe = load_recipe(recipe_file)
    with many_shards(1 << 12):
        resolved = prepare(recipe)
    deployment = up(recipe, resolved, lambda states: None)
    try:
        yield Live(recipe, resolved, deployment)
    finally:
        deployment.stop()
        shutil.rmtree(recipe.run_folder, ignore_errors=True)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a target of some thousand parameters, before training."""
    from tests.fakes.fusion_stream import tiny_target

    return tiny_target(tmp_path_factory.mktemp("distill"))
