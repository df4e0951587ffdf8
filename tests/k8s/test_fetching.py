"""Models of a hub or an object store reach the pods through the preparing job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.deploy.k8s.overlay import overlay_files
from services.models.catalogue import RECORD
from services.models.reference import parse_reference
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from tests.k8s.breaches import find
from tests.k8s.check.manifests import Document, kustomize, ray_cluster
from tests.k8s.check.run import problems
from tests.k8s.conftest import Build
from tests.k8s.rendering import recipe_of, render

HUB, STORED = "hf://org/model@v1.0", "s3://models/base?endpoint_override=http://minio.storage:9000"


@pytest.fixture
def fetched(build: Build, k8s: Path) -> list[Document]:
    """An overlay whose source comes from a hub and whose target from an object store of the site."""
    recipe = recipe_of(2, target={"model": STORED})
    recipe["sources"][0]["model"] = HUB
    done = render(k8s, recipe)
    assert done.exit_code == 0, done.output
    return kustomize(k8s / "overlays" / "many")


def preparing(documents: list[Document]) -> dict[str, Any]:
    container: dict[str, Any] = find(documents, "Job", "prepare-.*")["spec"]["template"]["spec"]["containers"][0]
    return container


def test_models_of_a_hub_and_of_a_store_are_fetched_before_pods_need_them(fetched: list[Document]) -> None:
    found = list(problems(fetched, ["base", "object-store"]))
    # The table draws the port of HTTPS; another one is the recipe's own.
    assert all(problem.endswith(("outside on 9000", "outside on 443")) for problem in found), found
    wait = ray_cluster(find(fetched, "RayService", "source-model-0"))["workerGroupSpecs"][0]["template"]["spec"]
    [marker] = [word for word in wait["initContainers"][0]["args"] if word.startswith("/data/models/")]
    assert marker == f"/data/models/{parse_reference(HUB).folder.name}/{RECORD}"
    [store] = [d for d in fetched if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "object-store"]
    assert store["spec"]["egress"][0]["ports"] == [{"protocol": "TCP", "port": 9000}]
    loaded = yaml.safe_load(find(fetched, "ConfigMap", "fusion-recipe")["data"]["recipe.yaml"])
    assert (loaded["sources"][0]["model"], loaded["target"]["model"]) == (HUB, STORED)


FETCH_BREACHES: dict[str, tuple[Callable[[list[Document]], Any], str]] = {
    "no token": (lambda d: preparing(d)["env"].pop(), "the token of the Secret model-hub does not reach it"),
    "no mirror": (
        lambda d: preparing(d)["envFrom"].remove({"configMapRef": {"name": "fusion-environment", "optional": True}}),
        "the ConfigMap fusion-environment does not reach it",
    ),
    "no credentials of the store": (
        lambda d: preparing(d)["envFrom"].pop(),
        "prepare: the Secret object-store does not reach it",
    ),
    "no way out": (
        lambda d: d.remove(find(d, "NetworkPolicy", "object-store")),
        "component object-store is missing",
    ),
}


@pytest.mark.parametrize("breach", FETCH_BREACHES)
def test_a_model_that_cannot_be_fetched_is_caught(fetched: list[Document], breach: str) -> None:
    change, message = FETCH_BREACHES[breach]
    change(fetched)
    assert message in "; ".join(problems(fetched, ["base", "object-store"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": {"model": "hf://nothing"}}, "target.model: hf://nothing names no model of the hub"),
        ({"target": {"model": "s3://key:secret@bucket/model"}}, "target.model: "),
    ],
)
def test_a_url_that_names_no_model_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(1, **changes)))
    with pytest.raises(RecipeError) as error:
        overlay_files(load_recipe(file), base="../../..", run_name="fused")
    assert words in str(error.value)
    assert "key:secret" not in str(error.value)
