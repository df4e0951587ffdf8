"""The reward service in an overlay: a folder with its kustomization and its Serve config."""

from __future__ import annotations

import math
from typing import Any

from services.deploy.k8s.cluster_recipe import served_model
from services.deploy.k8s.patches import dump, part, patch
from services.deploy.k8s.pods import GpuNodes, budget, given, logical_cpus, requests, sizes
from services.deploy.k8s.serving import WORKERS, serve_patch
from services.recipes.recipe import Recipe
from services.reward.config import RewardServiceConfig

REWARD_SECTION = "reward.serve"


def reward_files(recipe: Recipe, base: str, nodes: GpuNodes) -> dict[str, str]:
    """Return the files of the folder `reward`, by path; none where the recipe deploys no reward service.

    `base` is the repository's k8s folder as seen from that folder. Raises RecipeError for a model that pods cannot see.
    """
    served = recipe.beside.get(REWARD_SECTION)
    if not isinstance(served, RewardServiceConfig):
        return {}
    args = served.model_dump(mode="json", exclude_unset=True) | {"model": served_model(recipe)}
    application = {
        "name": served.application,
        "route_prefix": f"/{served.application}",
        "import_path": "services.reward.app:build",
        "args": args,
    }
    serve = serve_patch("reward", "reward", application)
    return {
        "reward/kustomization.yaml": dump(_kustomization(served, base, nodes)),
        "reward/rayservice.yaml": dump(serve),
    }


def _kustomization(served: RewardServiceConfig, base: str, nodes: GpuNodes) -> dict[str, Any]:
    operations = [
        *sizes(WORKERS, served.num_replicas, served.num_replicas),
        *logical_cpus(WORKERS, served.num_cpus),
        *requests(f"{WORKERS}/template/spec/containers/0", given(served, "num_cpus"), served.memory),
    ]
    if served.num_gpus:
        operations += nodes.operations(WORKERS, math.ceil(served.num_gpus))
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [part(base, "base/reward")],
        "components": [part(base, "components/gpu")] if served.num_gpus else [],
        "patches": [
            {"path": "rayservice.yaml"},
            patch("RayService", "reward", operations),
            budget("reward-worker", served.num_replicas - 1),
        ],
    }
