"""From a recipe to a kustomize overlay: what the recipe says, as patches on k8s/base, and nothing else.

Files of one overlay:

    kustomization.yaml             the parts: base, a folder per source
    recipe.yaml                    the recipe inside the cluster, for the preparing job and the training job
    fusion.yaml                    Serve config of the fusion service
    sources/NAME/                  one source: kustomization.yaml and its Serve config

The same recipe gives the same bytes. Adding a source adds its folder and touches `kustomization.yaml`, `recipe.yaml`
and `fusion.yaml`, where the fusion service learns of it; the files of other sources stay as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from services.deploy.k8s.cluster_recipe import GRPC_PORT, RUNS_FOLDER, cluster_recipe, model_marker, service_name
from services.deploy.serve_config import fusion_application, source_application
from services.fusion.app import SERVICER as FUSION_SERVICER
from services.recipes.recipe import Recipe
from services.rpc.health import SERVICER as HEALTH_SERVICER
from services.source.app import SERVICER as SOURCE_SERVICER
from services.source.config import SourceConfig

HEADER = "# Made by `fusion k8s render`: change the recipe, or patch it from an overlay of your own.\n"
_HTTP_PORT = 8000
_WAIT_SECONDS = 86_400
_GPUS_PER_NODE = 8
_WORKERS = "/spec/rayClusterConfig/workerGroupSpecs/0"
_JOB_WORKERS = "/spec/rayClusterSpec/workerGroupSpecs/0"
_CONTAINER = "template/spec/containers/0"


def overlay_files(recipe: Recipe, *, base: str, run_name: str) -> dict[str, str]:
    """Contents of the overlay's files, by relative path; raises RecipeError for what no pod could honour.

    Args:
        recipe: the run.
        base: the repository's k8s folder as seen from the overlay's, or a URL that kustomize reads.
        run_name: folder of the training run below the recipe's.
    """
    inside = cluster_recipe(recipe)
    deployed = [source for source in recipe.sources if source.address is None]
    fusion = fusion_application(inside, _fusion_args(recipe, inside))
    files = {
        "kustomization.yaml": _dump(_kustomization(recipe, base, run_name, [source.name for source in deployed])),
        "fusion.yaml": _dump(_serve_patch("fusion", "fusion", fusion)),
        "recipe.yaml": _dump(inside.model_dump(mode="json", by_alias=True, exclude_unset=True)),
    }
    for source in deployed:
        folder = f"sources/{source.name}"
        application = source_application(source, args=source.model_dump(mode="json", exclude_unset=True))
        files[f"{folder}/kustomization.yaml"] = _dump(_source_kustomization(source, _up(base, 2)))
        files[f"{folder}/rayservice.yaml"] = _dump(_serve_patch("source", service_name(source), application))
    return files


def write_overlay(files: Mapping[str, str], folder: Path) -> None:
    """Writes the overlay and removes the folders of sources that are gone."""
    for path in leftovers(files, folder):
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def differences(files: Mapping[str, str], folder: Path) -> list[str]:
    """What on disk is not what the recipe gives: a line per file."""
    found = []
    for name, text in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            found.append(f"{path} is not what the recipe gives")
    return [*found, *(f"{path} belongs to no source of the recipe" for path in leftovers(files, folder))]


def leftovers(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Files of an earlier rendering that the recipe has no use for."""
    mine = sorted(folder.glob("sources/*/*.yaml"))
    return [path for path in mine if str(path.relative_to(folder)) not in files and path.read_text().startswith(HEADER)]


def _fusion_args(recipe: Recipe, inside: Recipe) -> dict[str, Any]:
    args = inside.fusion_service().model_dump(mode="json", by_alias=True, exclude_unset=True)
    del args["service"]["address"]  # the manifests say where it listens
    # Reached as inside the cluster; what tells stored windows apart is as deployed.
    args["sources"] = [
        {**recipe.endpoint(source).model_dump(mode="json", exclude_none=True), "address": reached.address}
        for source, reached in zip(recipe.sources, inside.sources, strict=True)
    ]
    return args


def _kustomization(recipe: Recipe, base: str, run_name: str, sources: list[str]) -> dict[str, Any]:
    distill = recipe.distill
    _, most_workers = distill.worker_range
    document: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "llm-fusion",
        "resources": [_part(base, "base"), *(f"sources/{name}" for name in sources)],
        "components": [_part(base, f"components/{name}") for name in _components(recipe)],
        "configMapGenerator": [{"name": "fusion-recipe", "files": ["recipe.yaml"]}],
        # KubeRay's kinds are unknown to kustomize: a hash in the name would not reach their references.
        "generatorOptions": {"disableNameSuffixHash": True},
        "patches": [
            {"path": "fusion.yaml"},
            _patch("RayService", "fusion", _fusion_operations(recipe)),
            _budget("fusion-worker", recipe.service.num_replicas - 1),
        ],
    }
    if ports := sorted({int(source.address.rpartition(":")[2]) for source in recipe.sources if source.address}):
        admitted = [{"protocol": "TCP", "port": port} for port in ports]
        document["patches"].append(
            _patch("NetworkPolicy", "external-sources", [_replace("/spec/egress/0/ports", admitted)])
        )
    entrypoint = f"python -m services.distill --recipe /etc/fusion/recipe/recipe.yaml --run-name {run_name}"
    cpus = math.ceil(distill.cpus_per_worker)
    operations = [
        _replace("/spec/entrypoint", entrypoint),
        *_sizes(_JOB_WORKERS, most_workers, most_workers),  # an elastic run goes on with what is left
        _replace(f"{_JOB_WORKERS}/{_CONTAINER}/resources/requests/cpu", str(cpus)),
        _replace(f"{_JOB_WORKERS}/{_CONTAINER}/resources/limits/cpu", str(cpus)),
    ]
    document["patches"].append(_patch("RayJob", "distill", operations))
    return document


def _components(recipe: Recipe) -> Iterator[str]:
    if recipe.distill.device == "cuda":
        yield "gpu-distill"
    if any(source.address is not None for source in recipe.sources):
        yield "external-sources"


def _fusion_operations(recipe: Recipe) -> list[dict[str, Any]]:
    service = recipe.service
    run = str(RUNS_FOLDER / recipe.name / "recipe.yaml")
    markers = [run, *dict.fromkeys(model_marker(source.model) for source in recipe.sources)]
    return [
        *_sizes(_WORKERS, service.num_replicas, service.num_replicas),
        *_cpus(service.num_cpus),
        _replace(f"{_WORKERS}/template/spec/initContainers/0/args", _wait(markers)),
    ]


def _source_kustomization(source: SourceConfig, base: str) -> dict[str, Any]:
    fewest = source.autoscaling.min_replicas if source.autoscaling else source.num_replicas
    num_pods, gpus = _pods_of_a_replica(source)
    operations = [
        *_sizes(_WORKERS, fewest * num_pods, source.most_replicas * num_pods),
        *_cpus(source.num_cpus),
        _replace(f"{_WORKERS}/template/spec/initContainers/0/args", _wait([model_marker(source.model)])),
    ]
    for kind in ("requests", "limits") if gpus else ():
        operations.append(_add(f"{_WORKERS}/{_CONTAINER}/resources/{kind}/nvidia.com~1gpu", str(gpus)))
    components = ["components/gpu"] if gpus else []
    if source.autoscaling:
        components.append("components/autoscaling")
        account = "/spec/rayClusterConfig/headGroupSpec/template/spec/serviceAccountName"
        operations.append(_replace(account, f"autoscaler-{source.name}"))
    labels = "spec/rayClusterConfig/{}/template/metadata/labels"
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [_part(base, "base/source")],
        "components": [_part(base, name) for name in components],
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
            _patch("RayService", "source", operations),
            _budget("source-worker", (fewest - 1) * num_pods),
        ],
    }


def _serve_patch(resource: str, service: str, application: dict[str, Any]) -> dict[str, Any]:
    """A merge patch with the Serve config of a cluster that runs this one application."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": _HTTP_PORT},
        "grpc_options": {
            "port": GRPC_PORT,
            "grpc_servicer_functions": [
                FUSION_SERVICER if resource == "fusion" else SOURCE_SERVICER,
                HEALTH_SERVICER,
            ],
        },
        "applications": [application],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": resource},
        "spec": {"serveConfigV2": _yaml(config), "serveService": {"metadata": {"name": service}}},
    }


def _sizes(group: str, smallest: int, largest: int) -> list[dict[str, Any]]:
    return [
        _replace(f"{group}/replicas", max(1, smallest)),
        _replace(f"{group}/minReplicas", smallest),
        _replace(f"{group}/maxReplicas", largest),
    ]


def _cpus(num_cpus: float) -> list[dict[str, Any]]:
    """A pod has the logical CPUs of one replica, so that it holds exactly one; what it gets to run on is a patch."""
    return [_replace(f"{_WORKERS}/rayStartParams/num-cpus", str(max(1, math.ceil(num_cpus))))]


def _budget(name: str, min_available: int) -> dict[str, Any]:
    """One replica may be away; the last one only when somebody says so."""
    return _patch("PodDisruptionBudget", name, [_replace("/spec/minAvailable", max(1, min_available))])


def _pods_of_a_replica(source: SourceConfig) -> tuple[int, int]:
    """How many pods a replica fills, and the GPUs of each."""
    gpus = math.ceil(source.num_gpus)
    if not source.places_workers or source.placement_strategy == "STRICT_PACK":
        return 1, gpus
    a_pod = 1 if source.placement_strategy in {"SPREAD", "STRICT_SPREAD"} else min(gpus, _GPUS_PER_NODE)
    return math.ceil(gpus / a_pod), a_pod


def _wait(paths: list[str]) -> list[str]:
    options = [word for path in paths for word in ("--path", path)]
    return ["fusion", "k8s", "wait", *options, "--timeout-seconds", str(_WAIT_SECONDS)]


def _replace(path: str, value: Any) -> dict[str, Any]:
    return {"op": "replace", "path": path, "value": value}


def _add(path: str, value: Any) -> dict[str, Any]:
    return {"op": "add", "path": path, "value": value}


def _patch(kind: str, name: str, operations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"target": {"kind": kind, "name": name}, "patch": _yaml(operations)}


def _part(base: str, name: str) -> str:
    """A folder of the base, which may be a URL with a query at its end."""
    path, mark, query = base.partition("?")
    return f"{path}/{name}{mark}{query}"


def _up(base: str, levels: int) -> str:
    """The base as seen from a folder so many levels below the overlay's; a URL is the same from everywhere."""
    return base if "://" in base else os.path.normpath("../" * levels + base)


class _Dumper(yaml.SafeDumper):
    """Block scalars for text of several lines, so that a Serve config inside a manifest can be read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _yaml(document: Any) -> str:
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return text


def _dump(document: dict[str, Any]) -> str:
    return HEADER + _yaml({key: value for key, value in document.items() if value or key == "spec"})
