"""Parts of the manifests of every service: its Serve config, what its pods wait for, and the judge of key blocks."""

from __future__ import annotations

from typing import Any

from services.deploy.k8s.cluster_recipe import GRPC_PORT, model_marker
from services.deploy.k8s.patches import part, patch, replace, to_yaml
from services.deploy.k8s.pods import GpuNodes, budget, given, logical_cpus, requests, sizes
from services.deploy.serve_config import SERVICERS_BESIDE, application_beside
from services.fusion.app import SERVICER as FUSION_SERVICER
from services.recall.config import RecallConfig
from services.rpc.health import SERVICER as HEALTH_SERVICER
from services.source.app import SERVICER as SOURCE_SERVICER

_HTTP_PORT = 8000
_SERVICERS = {
    "source": SOURCE_SERVICER,
    "fusion": FUSION_SERVICER,
    "recall": SERVICERS_BESIDE["recall"],
    "reward": SERVICERS_BESIDE["reward.serve"],
}
_WAIT_SECONDS = 86_400
WORKERS = "/spec/rayClusterConfig/workerGroupSpecs/0"
"""Path of the worker group in a RayService."""
CONTAINER = "template/spec/containers/0"
"""Path of the container in a worker group."""


def recall_kustomization(recall: RecallConfig, base: str, nodes: GpuNodes) -> dict[str, Any]:
    """Return the kustomization of the judge's Ray cluster; `base` as seen from its folder."""
    assert recall.judge is not None, "only for a recipe with a judge"
    operations = [
        *sizes(WORKERS, recall.num_replicas, recall.num_replicas),
        *logical_cpus(WORKERS, recall.num_cpus),
        *requests(f"{WORKERS}/{CONTAINER}", given(recall, "num_cpus"), recall.memory),
        replace(f"{WORKERS}/template/spec/initContainers/0/args", wait_arguments([model_marker(recall.judge)])),
    ]
    if recall.num_gpus:
        operations += nodes.operations(WORKERS, 1)
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [part(base, "base/recall")],
        "components": [part(base, "components/gpu")] if recall.num_gpus else [],
        "patches": [
            {"path": "rayservice.yaml"},
            patch("RayService", "recall", operations),
            budget("recall-worker", recall.num_replicas - 1),
        ],
    }


def recall_serve_patch(recall: RecallConfig) -> dict[str, Any]:
    """Return a merge patch with the Serve config of the judge."""
    args = recall.model_dump(mode="json", exclude_unset=True)
    return serve_patch("recall", "recall", {**application_beside("recall", recall), "name": "recall", "args": args})


def serve_patch(resource: str, service: str, application: dict[str, Any]) -> dict[str, Any]:
    """Return a merge patch with the Serve config of a cluster that runs this one application."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": _HTTP_PORT},
        "grpc_options": {
            "port": GRPC_PORT,
            "grpc_servicer_functions": [
                _SERVICERS[resource],
                HEALTH_SERVICER,
            ],
        },
        "applications": [application],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": resource},
        "spec": {"serveConfigV2": to_yaml(config), "serveService": {"metadata": {"name": service}}},
    }


def wait_arguments(paths: list[str]) -> list[str]:
    """Return the arguments of an init container that waits for files."""
    options = [word for path in paths for word in ("--path", path)]
    return ["fusion", "k8s", "wait", *options, "--timeout-seconds", str(_WAIT_SECONDS)]
