"""What would cost work without a word is refused: each breach put back on purpose, and overlays of real sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.deploy.k8s.cluster_recipe import port_of_store
from services.deploy.k8s.overlay import overlay_files
from services.recipes.load import load_recipe
from services.recipes.recipe import RecipeError
from tests.k8s.breaches import find
from tests.k8s.check.manifests import Document, kustomize, ray_cluster
from tests.k8s.check.run import PARTS, problems
from tests.k8s.conftest import Build
from tests.k8s.rendering import recipe_of, render

LARGE = {"num_gpus": 16, "num_replicas": 3, "engine_args": {"tensor_parallel_size": 16}}
"""A source whose replica fills two nodes of eight GPUs."""


def container(document: Document) -> dict[str, Any]:
    found: dict[str, Any] = ray_cluster(document)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    return found


def budget(name: str, **selector: str) -> Document:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": selector}},
    }


def job(documents: list[Document]) -> dict[str, Any]:
    spec: dict[str, Any] = find(documents, "RayJob", "distill")["spec"]
    return spec


BREACHES: dict[str, tuple[Callable[[list[Document]], Any], str]] = {
    "deadline before the waits are over": (
        lambda d: job(d).update(preRunningDeadlineSeconds=7200),
        "preRunningDeadlineSeconds is 7200",
    ),
    "run shorter than its waits": (lambda d: job(d).update(activeDeadlineSeconds=80_000), "activeDeadlineSeconds is"),
    "head that gives up before preparing ends": (
        lambda d: ray_cluster(find(d, "RayJob", "distill"))["headGroupSpec"]["template"]["spec"]["initContainers"][
            0
        ].update(args=["fusion", "k8s", "wait", "--health", "fusion:9000", "--timeout-seconds", "7200"]),
        "waits 7200 s at most, the preparing job may take 21600",
    ),
    "budget that holds a head whose state is in Redis": (
        lambda d: d.append(budget("fusion-head", **{"llm-fusion/role": "fusion", "ray.io/node-type": "head"})),
        "PodDisruptionBudget fusion-head: no node with a head could be drained",
    ),
    "readiness of a replica in one pod": (
        lambda d: container(find(d, "RayService", "source-qwen3-8b"))["readinessProbe"]["grpc"].update(port=6380),
        "readiness is port 9000, not 6380",
    ),
    "fewer CPUs than the recipe says": (
        lambda d: container(find(d, "RayService", "source-qwen3-8b"))["resources"]["requests"].update(cpu="4"),
        "the recipe has 6 CPUs, the pod asks for 4",
    ),
    "less memory than the recipe says": (
        lambda d: container(find(d, "RayJob", "distill"))["resources"]["requests"].update(memory="16Gi"),
        "the recipe has 48Gi of memory, the pod asks for 16Gi",
    ),
    "throttled trainer": (
        lambda d: container(find(d, "RayJob", "distill"))["resources"]["limits"].update(cpu="4"),
        "a limit on CPU throttles the trainer",
    ),
    "scratch space of any size": (
        lambda d: container(find(d, "RayService", "fusion"))["resources"]["requests"].pop("ephemeral-storage"),
        "a request for ephemeral-storage is needed",
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_caught(build: Build, breach: str) -> None:
    change, message = BREACHES[breach]
    documents = build("production")
    change(documents)
    found = list(problems(documents, PARTS["production"]))
    assert any(message in problem for problem in found), found


def test_heads_keep_their_budgets_without_redis(build: Build) -> None:
    def heads(name: str) -> set[str]:
        found = [d["metadata"]["name"] for d in build(name) if d["kind"] == "PodDisruptionBudget"]
        return {budget for budget in found if "-head" in budget}

    assert heads("gpu") == {"fusion-head", "distill-head", "source-head-qwen3-8b", "source-head-llama-3-8b"}
    assert heads("production") == {"distill-head"}


def test_a_replica_over_several_pods_gets_ready_and_can_be_drained(build: Build, k8s: Path) -> None:
    recipe = recipe_of(1)
    recipe["sources"][0] |= LARGE
    assert render(k8s, recipe).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base"])) == []
    worker = container(find(documents, "RayService", "source-model-0"))
    assert worker["readinessProbe"]["grpc"]["port"] == 6380
    budget = find(documents, "PodDisruptionBudget", "source-worker-model-0")
    assert budget["spec"]["minAvailable"] == 4  # six pods, of which a replica's two may be away
    worker["readinessProbe"]["grpc"]["port"] = 9000
    assert "a replica fills 2 pods" in "".join(problems(documents, ["base"]))
    worker["readinessProbe"]["grpc"]["port"] = 6380
    budget["spec"]["minAvailable"] = 6
    assert "minAvailable 6 is not that of 3 replicas of 2 pods" in "".join(problems(documents, ["base"]))


def test_twelve_sources_of_mixed_sizes_with_an_object_store_on_nodes_of_four_gpus(build: Build, k8s: Path) -> None:
    recipe = recipe_of(
        12,
        service={"store": "s3://windows/store", "num_replicas": 3, "num_cpus": 6, "memory": "24Gi"},
        distill={"storage": "s3://checkpoints?endpoint_override=https://minio.storage:9443", "device": "cuda"},
    )
    recipe["sources"][0] |= LARGE | {"num_cpus": 16, "memory": "400Gi"}
    recipe["sources"][1] |= {"num_gpus": 8, "engine_args": {"tensor_parallel_size": 8}, "num_cpus": 16}
    recipe["sources"][2] |= {"autoscaling": {"min_replicas": 0, "max_replicas": 4}}
    done = render(k8s, recipe, "--gpus-per-node", "4", "--gpu-resource", "amd.com/gpu")
    assert done.exit_code == 0, done.output
    documents = kustomize(k8s / "overlays" / "many")
    # The table draws the port of HTTPS; another one is the recipe's own.
    found = list(problems(documents, ["base", "autoscaling", "object-store"]))
    assert all(problem.endswith("-> outside on 9443") for problem in found), found
    large = find(documents, "RayService", "source-model-0")
    assert ray_cluster(large)["workerGroupSpecs"][0]["replicas"] == 12  # three replicas over four nodes each
    resources = container(large)["resources"]
    assert resources["limits"] == {"memory": "400Gi", "amd.com/gpu": "4"}
    assert (resources["requests"]["cpu"], resources["requests"]["memory"]) == ("16", "400Gi")
    assert container(find(documents, "RayService", "fusion"))["resources"]["requests"]["memory"] == "24Gi"
    [toleration] = ray_cluster(large)["workerGroupSpecs"][0]["template"]["spec"]["tolerations"]
    assert toleration["key"] == "amd.com/gpu"
    ports = find(documents, "NetworkPolicy", "object-store")["spec"]["egress"][0]["ports"]
    assert [port["port"] for port in ports] == [443, 9443]


OBJECT_STORE_BREACHES: dict[str, tuple[Callable[[list[Document]], Any], str]] = {
    "no way out": (
        lambda d: d.remove(find(d, "NetworkPolicy", "object-store")),
        "component object-store is missing",
    ),
    "another port": (
        lambda d: find(d, "NetworkPolicy", "object-store")["spec"]["egress"][0].update(
            ports=[{"protocol": "TCP", "port": 9000}]
        ),
        "port 443 of the object store is shut",
    ),
    "no credentials": (
        lambda d: container(find(d, "RayJob", "distill"))["envFrom"].pop(),
        "the Secret object-store does not reach it",
    ),
}


def test_windows_in_an_object_store_are_reached_by_who_writes_and_who_reads_them(build: Build, k8s: Path) -> None:
    recipe = recipe_of(1, corpus={"files": ["/data/runs/text/*.jsonl"], "folder": "s3://windows/many"})
    assert render(k8s, recipe).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base", "object-store"])) == []
    [prepare] = [document for document in documents if document["kind"] == "Job"]
    prepare["spec"]["template"]["spec"]["containers"][0]["envFrom"].pop()
    assert "the Secret object-store does not reach it" in "; ".join(problems(documents, ["base", "object-store"]))


@pytest.mark.parametrize("breach", OBJECT_STORE_BREACHES)
def test_an_object_store_that_no_pod_reaches_is_caught(build: Build, k8s: Path, breach: str) -> None:
    assert render(k8s, recipe_of(1, service={"store": "s3://windows/store"})).exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base", "object-store"])) == []
    change, message = OBJECT_STORE_BREACHES[breach]
    change(documents)
    assert message in "; ".join(problems(documents, ["base", "object-store"]))


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("s3://bucket/folder", 443),
        ("s3://bucket/folder?endpoint_override=minio:9000&scheme=http", 9000),
        ("s3://bucket?endpoint_override=http://minio", 80),
        ("gs://bucket", 443),
    ],
)
def test_the_port_of_a_store_is_that_of_its_url(url: str, port: int) -> None:
    assert port_of_store(url) == port


@pytest.mark.parametrize(
    ("section", "key", "place"),
    [
        ("service", "store", "/scratch/store"),
        ("service", "store", "../elsewhere"),
        ("service", "store", "file:///scratch/store"),
        ("service", "store", "memory://store"),
        ("distill", "storage", "checkpoints"),
        ("corpus", "folder", "/scratch/windows"),
        ("corpus", "folder", "file:///scratch/windows"),
        ("distill", "storage", "/home/fusion/checkpoints"),
    ],
)
def test_a_place_that_pods_do_not_share_is_refused(tmp_path: Path, section: str, key: str, place: str) -> None:
    file = tmp_path / "recipe.yaml"
    recipe = recipe_of(1)
    file.write_text(yaml.safe_dump(recipe | {section: {**recipe.get(section, {}), key: place}}))
    with pytest.raises(RecipeError, match=rf"{section}\.{key}: .* is no place that all pods share"):
        overlay_files(load_recipe(file), base="../../..", run_name="fused")


def test_another_recipe_is_another_preparing_job(build: Build, k8s: Path) -> None:
    def name(recipe: dict[str, Any]) -> str:
        assert render(k8s, recipe).exit_code == 0
        [job] = [d for d in kustomize(k8s / "overlays" / "many") if d["kind"] == "Job"]
        return str(job["metadata"]["name"])

    first, again, other = name(recipe_of(1)), name(recipe_of(1)), name(recipe_of(2))
    assert first == again != other
    assert first.startswith("prepare-")


def test_a_queue_admits_the_training_job(build: Build, k8s: Path) -> None:
    assert render(k8s, recipe_of(1), "--queue", "research").exit_code == 0
    documents = kustomize(k8s / "overlays" / "many")
    assert list(problems(documents, ["base"])) == []
    assert find(documents, "RayJob", "distill")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


def test_pods_on_openshift_reach_its_dns(build: Build, k8s: Path) -> None:
    assert render(k8s, recipe_of(1)).exit_code == 0
    folder = k8s / "overlays" / "openshift"
    folder.mkdir()
    parts = {"resources": ["../many"], "components": ["../../components/openshift"]}
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "llm-fusion"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kind | parts))
    assert list(problems(kustomize(folder), ["base", "openshift"])) == []


def test_accounts_get_a_role_of_the_cloud_instead_of_a_secret(build: Build, k8s: Path) -> None:
    assert render(k8s, recipe_of(1, service={"store": "s3://windows/store"})).exit_code == 0
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/windows"}
    site = k8s / "overlays" / "site"
    site.mkdir()
    patch = yaml.safe_dump([{"op": "add", "path": "/metadata/annotations", "value": role}])
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "llm-fusion",
        "resources": ["../many"],
        "patches": [{"target": {"kind": "ServiceAccount", "name": "fusion|distill|prepare"}, "patch": patch}],
    }
    (site / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = kustomize(site)
    assert list(problems(documents, ["base", "object-store"])) == []
    accounts = {
        d["metadata"]["name"]: d["metadata"].get("annotations") for d in documents if d["kind"] == "ServiceAccount"
    }
    assert accounts == {"fusion": role, "distill": role, "prepare": role, "source": None}
