"""Models of a hub or an object store reach the pods through the preparing job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.app import app
from services.deploy.k8s.overlay import overlay_files
from services.models.catalogue import RECORD
from services.models.reference import parse_reference
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from tests.fakes.hub import REPOSITORY, running_hub
from tests.fakes.tiny_model import make_tiny_model, sentences
from tests.k8s.breaches import find
from tests.k8s.check.manifests import Document, kustomize, ray_cluster
from tests.k8s.check.run import problems
from tests.k8s.conftest import Build
from tests.k8s.rendering import recipe_of, render, runner

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
    assert marker == f"/data/models/remote/{parse_reference(HUB).folder.name}/{RECORD}"
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


def test_the_preparing_job_fetches_a_private_model_and_pods_stop_waiting(
    build: Build, k8s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's own command, against a hub on this machine; /data is a folder here."""
    url, data = f"hf://{REPOSITORY}", tmp_path / "data"
    recipe = recipe_of(1, target={"model": url}, corpus={"files": ["/data/runs/text/*.txt"], "window_bytes": 128})
    recipe["sources"][0] |= {"model": url, "max_tokens": 255}
    assert render(k8s, recipe).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    inside = find(documents, "ConfigMap", "fusion-recipe")["data"]["recipe.yaml"].replace("/data/", f"{data}/")
    (tmp_path / "recipe.yaml").write_text(inside)
    (data / "runs" / "text").mkdir(parents=True)
    for number in range(6):
        (data / "runs" / "text" / f"{number}.txt").write_text(sentences(300, seed=number))
    wait = ray_cluster(find(documents, "RayService", "source-model-0"))["workerGroupSpecs"][0]["template"]["spec"]
    [marker] = [word for word in wait["initContainers"][0]["args"] if word.startswith("/data/models/")]
    here = marker.replace("/data/", f"{data}/")
    monkeypatch.setenv("FUSION_HOME", str(data))
    program, *words, path = preparing(documents)["args"]
    assert (program, path) == ("fusion", "/etc/fusion/recipe/recipe.yaml")
    command = [*words, str(tmp_path / "recipe.yaml")]
    with running_hub() as hub:
        hub.token = "a-token"
        folder = make_tiny_model(tmp_path / "tiny", vocabulary_size=300, seed=1)
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        refused = runner.invoke(app, command)
        assert (refused.exit_code, REPOSITORY in refused.stderr) == (2, True), refused.output
        assert runner.invoke(app, ["k8s", "wait", "--path", here, "--timeout-seconds", "0"]).exit_code == 2
        monkeypatch.setenv("HF_TOKEN", "a-token")  # as the Secret model-hub does
        done = runner.invoke(app, command)
        assert done.exit_code == 0, done.output
        asked = len(hub.requests)
        assert runner.invoke(app, command).exit_code == 0
        assert len(hub.requests) == asked  # what is there is left alone
    assert runner.invoke(app, ["k8s", "wait", "--path", here, "--timeout-seconds", "0"]).exit_code == 0
