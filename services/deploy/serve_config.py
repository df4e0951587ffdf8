"""The declarative Serve config of a recipe."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from services.fusion.app import SERVICER as FUSION_SERVICER
from services.recall.app import SERVICER as RECALL_SERVICER
from services.recipes.recipe import Recipe, ServiceBeside
from services.reward.app import SERVICER as REWARD_SERVICER
from services.rpc.health import SERVICER as HEALTH_SERVICER
from services.source.app import SERVICER as SOURCE_SERVICER
from services.source.config import SourceConfig
from services.verify.app import SERVICER as VERIFY_SERVICER

SERVICERS_BESIDE = {"recall": RECALL_SERVICER, "verify": VERIFY_SERVICER, "reward.serve": REWARD_SERVICER}
"""The servicers of the services beside sources and fusion service, by section of the recipe."""


def serve_config(recipe: Recipe, only: Collection[str] | None = None) -> dict[str, Any]:
    """Return the Serve config: an application for each source without an address, the fusion service, and those beside.

    `only`: names of the applications to include, all by default.
    """
    service, cores = recipe.service, _cores(recipe)
    applications = [
        source_application(source, source.model_dump(mode="json"), cores.get(source.name, {}))
        for source in recipe.deployed
    ]
    if service.address is None:
        args = recipe.fusion_service().model_dump(mode="json", by_alias=True)
        applications.append(fusion_application(recipe, args))
    servicers = [SOURCE_SERVICER, FUSION_SERVICER]
    for section, served in recipe.beside.items():
        applications.append(application_beside(section, served))
        servicers.append(SERVICERS_BESIDE[section])
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": service.host, "port": service.http_port},
        "grpc_options": {
            "port": service.grpc_port,
            "grpc_servicer_functions": [*servicers, HEALTH_SERVICER],
        },
        "applications": [entry for entry in applications if only is None or entry["name"] in only],
    }


def source_application(
    source: SourceConfig, args: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return Serve's entry for one source; the source's own variables come before those of `env`."""
    return {
        "name": source.name,
        "route_prefix": f"/{source.name}",
        "import_path": "services.source.app:build",
        "args": dict(args),
        "runtime_env": {"env_vars": {**(env or {}), **source.env}},
    }


def fusion_application(recipe: Recipe, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return Serve's entry for the fusion service."""
    return {
        "name": recipe.service.application,
        "route_prefix": f"/{recipe.service.application}",
        "import_path": "services.fusion.app:build",
        "args": dict(args),
    }


def application_beside(section: str, config: ServiceBeside) -> dict[str, Any]:
    """Return Serve's entry for the service of a section, one that is deployed beside sources and fusion service."""
    return {
        "name": config.application,
        "route_prefix": f"/{config.application}",
        "import_path": f"services.{section.partition('.')[0]}.app:build",
        "args": config.model_dump(mode="json"),
    }


def _cores(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return environment variables that give vLLM engines on this machine's CPU cores of their own, by source.

    OpenMP threads of two engines that spin on the same cores slow each other down.
    """
    names = [s.name for s in recipe.deployed if s.engine.kind == "vllm" and s.num_gpus == 0]
    cores = sorted(os.sched_getaffinity(0))
    if not names or len(cores) < len(names):
        return {}
    share = len(cores) // len(names)
    return {
        name: {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[at * share : (at + 1) * share]))}
        for at, name in enumerate(names)
    }
