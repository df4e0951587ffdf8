"""Sizes of worker groups: the number of pods, the resources of each, and how many may be away at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from services.deploy.k8s.patches import add, patch, replace
from services.source.config import SourceConfig

RAYLET_PORT = 6380
"""Port of every Ray node's own health check, in the manifests."""

_NVIDIA = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class GpuNodes:
    """The nodes with GPUs of a cluster.

    Attributes:
        per_node: GPUs of one node.
        resource: name under which the device plugin offers them.
    """

    per_node: int = 8
    resource: str = _NVIDIA

    def operations(self, group: str, gpus: int) -> list[dict[str, Any]]:
        """Return patches that give each pod of a worker group this many GPUs and let it run on their nodes."""
        resources = f"{group}/template/spec/containers/0/resources"
        key = self.resource.replace("/", "~1")
        operations = [add(f"{resources}/{kind}/{key}", str(gpus)) for kind in ("requests", "limits")]
        if self.resource != _NVIDIA:  # the component tolerates NVIDIA's taint
            toleration = {"key": self.resource, "operator": "Exists", "effect": "NoSchedule"}
            operations.append(add(f"{group}/template/spec/tolerations", [toleration]))
        return operations


NVIDIA_NODES = GpuNodes()


def given(section: BaseModel, key: str) -> float | None:
    """Return a number of the recipe; None where the recipe leaves it to the default."""
    value: float = getattr(section, key)
    return value if key in section.model_fields_set else None


def sizes(group: str, smallest: int, largest: int) -> list[dict[str, Any]]:
    """Return patches with the bounds of a worker group."""
    return [
        replace(f"{group}/replicas", max(1, smallest)),
        replace(f"{group}/minReplicas", smallest),
        replace(f"{group}/maxReplicas", largest),
    ]


def logical_cpus(group: str, num_cpus: float) -> list[dict[str, Any]]:
    """Return a patch that gives a pod the logical CPUs of one replica, so that it holds exactly one."""
    return [replace(f"{group}/rayStartParams/num-cpus", str(max(1, math.ceil(num_cpus))))]


def requests(container: str, num_cpus: float | None, memory: str | None) -> list[dict[str, Any]]:
    """Return patches with the CPUs and the memory of a pod; where the recipe names none, the manifests' stay."""
    operations = []
    if num_cpus is not None:
        operations.append(replace(f"{container}/resources/requests/cpu", str(max(1, math.ceil(num_cpus)))))
    if memory is not None:
        operations += [replace(f"{container}/resources/{kind}/memory", memory) for kind in ("requests", "limits")]
    return operations


def budget(name: str, min_available: int, *, at_least: int = 1) -> dict[str, Any]:
    """Return a patch that lets one replica be away. The last one, of `at_least` pods, goes only when it is deleted."""
    return patch("PodDisruptionBudget", name, [replace("/spec/minAvailable", max(at_least, min_available))])


def pods_of_a_replica(source: SourceConfig, nodes: GpuNodes) -> tuple[int, int]:
    """Return the number of pods that a replica fills, and the GPUs of each."""
    gpus = math.ceil(source.num_gpus)
    if not source.places_workers or source.placement_strategy == "STRICT_PACK":
        return 1, gpus
    a_pod = 1 if source.placement_strategy in {"SPREAD", "STRICT_SPREAD"} else min(gpus, nodes.per_node)
    return math.ceil(gpus / a_pod), a_pod
