"""The kustomize overlay of a recipe: patches on k8s/base with the recipe's settings, and nothing else.

Files of one overlay:

    kustomization.yaml             the parts: base, a folder per source
    recipe.yaml                    the recipe inside the cluster, for the preparing job and the training job
    fusion.yaml                    Serve config of the fusion service
    recall/                        the judge of key blocks, where the recipe has one
    reward/                        the reward service, where the recipe deploys one
    sources/NAME/                  one source: kustomization.yaml and its Serve config

The same recipe gives the same bytes. Adding a source adds its folder and touches `kustomization.yaml`, `recipe.yaml`
and `fusion.yaml`, which tell the fusion service of it; the files of other sources stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from services.deploy.k8s.cluster_recipe import (
    RUNS_FOLDER,
    cluster_recipe,
    model_marker,
    object_stores,
    port_of_store,
    service_name,
    stored_models,
)
from services.deploy.k8s.patches import HEADER, add, dump, part, patch, rename, replace, up
from services.deploy.k8s.pods import (
    NVIDIA_NODES,
    RAYLET_PORT,
    GpuNodes,
    budget,
    given,
    logical_cpus,
    pods_of_a_replica,
    requests,
    sizes,
)
from services.deploy.k8s.reward import REWARD_SECTION, reward_files
from services.deploy.k8s.serving import (
    CONTAINER,
    WORKERS,
    recall_kustomization,
    recall_serve_patch,
    serve_patch,
    wait_arguments,
)
from services.deploy.serve_config import fusion_application, source_application
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig

_BESIDE = {"recall": "recall", REWARD_SECTION: "reward"}
"""Folders of the services beside sources and fusion service, by section of the recipe."""
_JOB_WORKERS = "/spec/rayClusterSpec/workerGroupSpecs/0"


def overlay_files(
    recipe: Recipe, *, base: str, run_name: str, nodes: GpuNodes = NVIDIA_NODES, queue: str | None = None
) -> dict[str, str]:
    """Return the contents of the overlay's files, by path; raises RecipeError for what no pod could honour.

    Args:
        recipe: the run.
        base: the repository's k8s folder as seen from the overlay's, or a URL that kustomize reads.
        run_name: folder of the training run below the recipe's.
        nodes: the nodes with GPUs of the cluster.
        queue: Kueue queue that admits the training job; none by default.
    """
    inside = cluster_recipe(recipe)
    fusion = fusion_application(inside, _fusion_args(recipe, inside))
    files = {
        "kustomization.yaml": dump(_kustomization(recipe, inside, base, run_name, nodes, queue)),
        "fusion.yaml": dump(serve_patch("fusion", "fusion", fusion)),
        "recipe.yaml": _inside_yaml(inside),
    }
    for source in recipe.deployed:
        folder = f"sources/{source.name}"
        application = source_application(source, args=source.model_dump(mode="json", exclude_unset=True))
        files[f"{folder}/kustomization.yaml"] = dump(_source_kustomization(source, up(base, 2), nodes))
        files[f"{folder}/rayservice.yaml"] = dump(serve_patch("source", service_name(source), application))
    if recipe.recall is not None and "recall" in recipe.beside:
        files["recall/kustomization.yaml"] = dump(recall_kustomization(recipe.recall, up(base, 1), nodes))
        files["recall/rayservice.yaml"] = dump(recall_serve_patch(recipe.recall))
    files |= reward_files(recipe, up(base, 1), nodes)
    return files


def write_overlay(files: Mapping[str, str], folder: Path) -> None:
    """Write the overlay and remove the folders of sources that are gone."""
    for path in leftovers(files, folder):
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def differences(files: Mapping[str, str], folder: Path) -> list[str]:
    """Return a line for each file on disk that differs from the recipe's."""
    found = []
    for name, text in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            found.append(f"{path} is not what the recipe gives")
    return [*found, *(f"{path} belongs to no source of the recipe" for path in leftovers(files, folder))]


def leftovers(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Return the files of an earlier rendering that the recipe does not need."""
    beside = [path for name in _BESIDE.values() for path in folder.glob(f"{name}/*.yaml")]
    mine = sorted([*folder.glob("sources/*/*.yaml"), *beside])
    return [path for path in mine if str(path.relative_to(folder)) not in files and path.read_text().startswith(HEADER)]


def _fusion_args(recipe: Recipe, inside: Recipe) -> dict[str, Any]:
    args = inside.fusion_service().model_dump(mode="json", by_alias=True, exclude_unset=True)
    del args["service"]["address"]  # the manifests say where it listens
    # The address is that inside the cluster; the identity of stored windows is that of the deployed source.
    args["sources"] = [
        {**recipe.endpoint(source).model_dump(mode="json", exclude_none=True), "address": reached.address}
        for source, reached in zip(recipe.sources, inside.sources, strict=True)
    ]
    return args


def _kustomization(
    recipe: Recipe, inside: Recipe, base: str, run_name: str, nodes: GpuNodes, queue: str | None
) -> dict[str, Any]:
    sources = [source.name for source in recipe.deployed]
    beside = [folder for section, folder in _BESIDE.items() if section in recipe.beside]
    document: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "llm-fusion",
        "resources": [part(base, "base"), *(f"sources/{name}" for name in sources), *beside],
        "components": [part(base, f"components/{name}") for name in _components(recipe)],
        "configMapGenerator": [{"name": "fusion-recipe", "files": ["recipe.yaml"]}],
        # KubeRay's kinds are unknown to kustomize: a hash in the name would not reach their references.
        "generatorOptions": {"disableNameSuffixHash": True},
        "patches": [
            {"path": "fusion.yaml"},
            patch("RayService", "fusion", _fusion_operations(recipe)),
            budget("fusion-worker", recipe.service.num_replicas - 1),
        ],
    }
    if ports := sorted({int(source.address.rpartition(":")[2]) for source in recipe.sources if source.address}):
        document["patches"].append(_admitted("external-sources", ports))
    if ports := sorted(set(map(port_of_store, [*object_stores(recipe), *stored_models(recipe)]))):
        document["patches"].append(_admitted("object-store", ports))
    document["patches"].append(patch("RayJob", "distill", _job_operations(recipe, run_name, nodes, queue)))
    document["patches"].append(rename("Job", "prepare", f"prepare-{_digest(inside)}"))
    return document


def _digest(inside: Recipe) -> str:
    """Return a hash of the preparing job's inputs: a Job cannot be changed, so another recipe gets another Job."""
    version = metadata.version("llm-fusion")
    return hashlib.sha256(f"{version}\0{_inside_yaml(inside)}".encode()).hexdigest()[:8]


def _inside_yaml(inside: Recipe) -> str:
    return dump(inside.model_dump(mode="json", by_alias=True, exclude_unset=True))


def _admitted(policy: str, ports: list[int]) -> dict[str, Any]:
    """Return a patch with the ports to which a component's policy lets pods connect."""
    return patch(
        "NetworkPolicy", policy, [replace("/spec/egress/0/ports", [{"protocol": "TCP", "port": p} for p in ports])]
    )


def _job_operations(recipe: Recipe, run_name: str, nodes: GpuNodes, queue: str | None) -> list[dict[str, Any]]:
    distill = recipe.distill
    _, most_workers = distill.worker_range
    entrypoint = f"python -m services.distill --recipe /etc/fusion/recipe/recipe.yaml --run-name {run_name}"
    operations = [
        replace("/spec/entrypoint", entrypoint),
        *sizes(_JOB_WORKERS, most_workers, most_workers),  # an elastic run goes on with the remaining workers
        *requests(f"{_JOB_WORKERS}/{CONTAINER}", distill.cpus_per_worker, distill.memory_per_worker),
    ]
    if distill.device == "cuda":
        operations += nodes.operations(_JOB_WORKERS, 1)
    if queue is not None:
        operations.append(add("/metadata/labels/kueue.x-k8s.io~1queue-name", queue))
    return operations


def _components(recipe: Recipe) -> Iterator[str]:
    if recipe.distill.device == "cuda":
        yield "gpu-distill"
    if any(source.address is not None for source in recipe.sources):
        yield "external-sources"
    if object_stores(recipe) or stored_models(recipe):
        yield "object-store"


def _fusion_operations(recipe: Recipe) -> list[dict[str, Any]]:
    service = recipe.service
    run = str(RUNS_FOLDER / recipe.name / "recipe.yaml")
    markers = [run, *dict.fromkeys(model_marker(source.model) for source in recipe.sources)]
    return [
        *sizes(WORKERS, service.num_replicas, service.num_replicas),
        *logical_cpus(WORKERS, service.num_cpus),
        *requests(f"{WORKERS}/{CONTAINER}", given(service, "num_cpus"), service.memory),
        replace(f"{WORKERS}/template/spec/initContainers/0/args", wait_arguments(markers)),
    ]


def _source_kustomization(source: SourceConfig, base: str, nodes: GpuNodes) -> dict[str, Any]:
    fewest = source.autoscaling.min_replicas if source.autoscaling else source.num_replicas
    num_pods, gpus = pods_of_a_replica(source, nodes)
    operations = [
        *sizes(WORKERS, fewest * num_pods, source.most_replicas * num_pods),
        *logical_cpus(WORKERS, source.num_cpus),
        *requests(f"{WORKERS}/{CONTAINER}", given(source, "num_cpus"), source.memory),
        replace(f"{WORKERS}/template/spec/initContainers/0/args", wait_arguments([model_marker(source.model)])),
    ]
    if gpus:
        operations += nodes.operations(WORKERS, gpus)
    if num_pods > 1:
        # Serve has a proxy where the replica is; the pods that hold its other workers answer as Ray nodes only.
        operations.append(replace(f"{WORKERS}/{CONTAINER}/readinessProbe/grpc/port", RAYLET_PORT))
    components = ["components/gpu"] if gpus else []
    if source.autoscaling:
        components.append("components/autoscaling")
        account = "/spec/rayClusterConfig/headGroupSpec/template/spec/serviceAccountName"
        operations.append(replace(account, f"autoscaler-{source.name}"))
    labels = "spec/rayClusterConfig/{}/template/metadata/labels"
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [part(base, "base/source")],
        "components": [part(base, name) for name in components],
        "nameSuffix": f"-{source.name}",
        "labels": [
            {
                "pairs": {"llm-fusion/source": source.name},
                "includeSelectors": True,
                "fields": [
                    {"kind": "RayService", "path": labels.format(group), "create": True}
                    for group in ("headGroupSpec", "workerGroupSpecs[]")
                ],
            }
        ],
        "patches": [
            {"path": "rayservice.yaml"},
            patch("RayService", "source", operations),
            budget("source-worker", (fewest - 1) * num_pods, at_least=num_pods),
        ],
    }
