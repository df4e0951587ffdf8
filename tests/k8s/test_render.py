"""`fusion k8s render`: the same bytes for the same recipe, valid output for any number of sources, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.deploy.k8s.overlay import overlay_files
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from tests.k8s.check.manifests import kustomize
from tests.k8s.check.run import problems
from tests.k8s.conftest import Build
from tests.k8s.rendering import recipe_of, render

runner = CliRunner()


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.yaml"))}


@pytest.mark.parametrize("num_sources", [1, 3, 12])
def test_any_number_of_sources_gives_manifests_that_hold(build: Build, k8s: Path, num_sources: int) -> None:
    assert render(k8s, recipe_of(num_sources)).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert sum(document["kind"] == "RayService" for document in documents) == num_sources + 1
    assert list(problems(documents, ["base"])) == []


def test_autoscaling_and_spread_gpus_reach_the_worker_group(build: Build, k8s: Path) -> None:
    recipe = recipe_of(3)
    recipe["sources"][0] |= {"autoscaling": {"min_replicas": 0, "max_replicas": 5}}
    recipe["sources"][1] |= {"num_gpus": 4, "num_replicas": 2, "placement_strategy": "SPREAD"}
    recipe["sources"][1] |= {"engine_args": {"tensor_parallel_size": 4}}
    recipe["sources"][2] |= {"num_gpus": 16, "engine_args": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}}
    assert render(k8s, recipe).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base", "autoscaling"])) == []
    groups = {}
    for document in documents:
        if document["kind"] == "RayService":
            [group] = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            sizes = (group["minReplicas"], group["replicas"], group["maxReplicas"])
            groups[document["metadata"]["name"]] = (sizes, limits.get("nvidia.com/gpu"))
    assert groups["source-model-0"] == ((0, 1, 5), "1")
    assert groups["source-model-1"] == ((8, 8, 8), "1")
    assert groups["source-model-2"] == ((2, 2, 2), "8")


def test_a_reward_service_comes_with_the_recipe_that_has_one(build: Build, k8s: Path) -> None:
    recipe = recipe_of(1)
    serve = {"num_replicas": 2, "num_cpus": 3, "num_gpus": 1, "memory": "12Gi", "max_items": 7}
    reward = {"start": "gemma-3-270m", "data": ["/data/runs/pairs.jsonl"], "domains": {"chat": "Be kind."}}
    assert render(k8s, recipe | {"reward": reward | {"serve": serve}}).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base", "reward"])) == []
    [service] = [d for d in documents if (d["kind"], d["metadata"]["name"]) == ("RayService", "reward")]
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"] == serve | {"model": f"/data/runs/{recipe['name']}/reward/trained/model"}
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert (group["replicas"], resources["requests"]["memory"], resources["limits"]["nvidia.com/gpu"]) == (
        2,
        "12Gi",
        "1",
    )
    [inside] = [d["data"]["recipe.yaml"] for d in documents if "recipe.yaml" in d.get("data", {})]
    assert yaml.safe_load(inside)["reward"]["serve"] == {"address": "reward:9000", "application": "reward"}
    refused = render(k8s, recipe | {"reward": reward | {"serve": {"model": "/home/me/model"}}})
    assert (refused.exit_code, "reward.serve.model: /home/me/model" in refused.stderr.replace("\n", " ")) == (2, True)
    assert render(k8s, recipe).exit_code == 0
    assert not (k8s / "overlays" / "many" / "reward.yaml").exists()


def test_adding_a_source_changes_no_other_source(k8s: Path) -> None:
    folder = k8s / "overlays" / "many"
    render(k8s, recipe_of(3))
    before = files_of(folder)
    render(k8s, recipe_of(4))
    after = files_of(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "kustomization.yaml",
        "fusion.yaml",
        "recipe.yaml",
        "sources/model-3/kustomization.yaml",
        "sources/model-3/rayservice.yaml",
    }
    render(k8s, recipe_of(3))
    assert files_of(folder) == before
    assert not (folder / "sources" / "model-3").exists()


def test_check_tells_what_is_not_current_and_writes_nothing(k8s: Path) -> None:
    folder = k8s / "overlays" / "many"
    render(k8s, recipe_of(2))
    assert render(k8s, recipe_of(2), "--check").exit_code == 0
    (folder / "sources" / "model-0" / "rayservice.yaml").write_text("edited")
    before = files_of(folder)
    result = render(k8s, recipe_of(3), "--check")
    assert result.exit_code == 1
    for words in ("model-0/rayservice.yaml is not what", "model-2/kustomization.yaml is missing"):
        assert words in result.stderr.replace("\n", " ")
    assert files_of(folder) == before
    render(k8s, recipe_of(2))
    assert "belongs to no source" in render(k8s, recipe_of(1), "--check").stderr


def test_a_base_by_url_is_the_same_from_every_folder() -> None:
    files = overlay_files(
        load_recipe("quickstart"), base="https://example.com/llm-fusion//k8s?ref=v0.1.0", run_name="fused"
    )
    assert "- https://example.com/llm-fusion//k8s/base?ref=v0.1.0\n" in files["kustomization.yaml"]
    assert (
        "- https://example.com/llm-fusion//k8s/base/source?ref=v0.1.0\n" in files["sources/gemma3/kustomization.yaml"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [{"name": "a", "model": "models/a"}]}, "sources.0.model: models/a is not below /data/models"),
        ({"target": {"model": "~/target"}}, "target.model: ~/target is not below"),
        ({"corpus": {"files": ["text/*.txt"]}}, "corpus.files: text/*.txt is not below /data/runs"),
        (
            {"distill": {"loss": "jsd", "on_policy": {"prompts": ["/text/p.jsonl"], "rounds": 1, "round_steps": 1}}},
            "distill.on_policy.prompts: /text/p.jsonl is not below /data/runs",
        ),
        ({"service": {"address": "fusion.example.com:9000"}}, "service.address: leave it out"),
    ],
)
def test_what_no_pod_could_see_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of(1, **changes)))
    with pytest.raises(RecipeError) as error:
        overlay_files(load_recipe(file), base="../../..", run_name="fused")
    assert words in str(error.value)


def test_cleaned_documents_and_windows_lie_in_the_volume_of_runs(tmp_path: Path) -> None:
    recipe = recipe_of(1, curate={"files": ["heap/*.jsonl"]})
    del recipe["corpus"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    overlay = overlay_files(load_recipe(file), base="../../..", run_name="fused")
    (tmp_path / "inside.yaml").write_text(overlay["recipe.yaml"])
    inside = load_recipe(tmp_path / "inside.yaml")
    assert inside.corpus.files == ("/data/runs/many/curate/documents/*.parquet",)
    assert inside.reads_curated
    assert inside.corpus_folder == "/data/runs/many/corpus"


def test_the_base_has_to_be_there(tmp_path: Path) -> None:
    result = runner.invoke(app, ["k8s", "render", "quickstart", "--base", str(tmp_path), "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--base" in result.stderr


def test_wait_ends_when_the_file_is_there_and_names_what_is_missing(tmp_path: Path) -> None:
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.touch()
    assert runner.invoke(app, ["k8s", "wait", "--path", str(there)]).exit_code == 0
    result = runner.invoke(app, ["k8s", "wait", "--path", str(missing), "--timeout-seconds", "0"])
    assert result.exit_code == 2
    assert str(missing) in result.stderr.replace("\n", "")
    assert runner.invoke(app, ["k8s", "wait"]).exit_code == 2


def test_the_judge_of_key_blocks_is_served_where_the_recipe_has_one(build: Build, k8s: Path) -> None:
    folder = k8s / "overlays" / "many"
    recall = {"judge": "/data/models/judge", "num_replicas": 3, "num_gpus": 1, "memory": "6Gi", "application": "mine"}
    assert render(k8s, recipe_of(1, recall=recall)).exit_code == 0
    documents = kustomize(folder)
    assert list(problems(documents, ["base"])) == []
    [judge] = [d for d in documents if d["kind"] == "RayService" and d["metadata"]["name"] == "recall"]
    [group] = judge["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert (group["replicas"], resources["limits"]["nvidia.com/gpu"], resources["limits"]["memory"]) == (3, "1", "6Gi")
    inside = yaml.safe_load((folder / "recipe.yaml").read_text())["recall"]
    assert (inside["address"], inside["application"]) == ("recall:9000", "recall")
    assert render(k8s, recipe_of(1, recall={**recall, "address": "judge.example.com:9000"})).exit_code == 0
    assert not (folder / "recall").exists()
    assert all(d["metadata"]["name"] != "recall" for d in kustomize(folder) if d["kind"] == "RayService")
    wrong = render(k8s, recipe_of(1, recall={"judge": "/home/me/judge"}))
    assert (wrong.exit_code, "recall.judge: /home/me/judge is not below /data/models" in wrong.output) == (2, True)
