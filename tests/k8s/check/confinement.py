"""What pods may do, and which images they run."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.k8s.check.manifests import Document, of_kind, pods, ray_cluster, title

VERSION = importlib.metadata.version("llm-fusion")


def images_are_pinned(documents: Sequence[Document]) -> Iterator[str]:
    """A tag with a version or a digest; our own images carry the version of this tree."""
    for pod in pods(documents):
        for container in pod.containers():
            image = container["image"]
            name, _, tag = image.rpartition(":")
            if "@sha256:" not in image and ("/" in tag or not name or not re.search(r"\d+\.\d+", tag)):
                yield f"{pod.name}, {container['name']}: image {image} is not pinned to a version"
            elif name.rpartition("/")[2] == "llm-fusion" and not tag.startswith(f"{VERSION}-"):
                yield f"{pod.name}, {container['name']}: image {image} is not of version {VERSION}"


def pods_are_confined(documents: Sequence[Document]) -> Iterator[str]:
    """The restricted Pod Security Standard, a read-only root, no API token without need, requests, probes."""
    autoscaled = {title(d) for d in of_kind(documents, "RayService") if ray_cluster(d).get("enableInTreeAutoscaling")}
    for pod in pods(documents):
        security = pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield f"{pod.name}: must run as a user that is not root"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: seccompProfile must be RuntimeDefault"
        needs_token = pod.owner in autoscaled and pod.group == "head"
        if pod.spec.get("automountServiceAccountToken") is not needs_token:
            yield f"{pod.name}: automountServiceAccountToken must be {str(needs_token).lower()}"
        for container in pod.containers():
            yield from (f"{pod.name}, {container['name']}: {problem}" for problem in _container_problems(container))
        if pod.group == "submitter" or pod.owner.startswith("Job "):
            continue  # they end by themselves
        for container in pod.spec["containers"]:
            for probe in {"readinessProbe", "livenessProbe"} - container.keys():
                yield f"{pod.name}, {container['name']}: {probe} is missing"


def _container_problems(container: dict[str, Any]) -> Iterator[str]:
    security, resources = container.get("securityContext", {}), container.get("resources", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "allowPrivilegeEscalation must be false"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem must be true"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "all capabilities must be dropped"
    if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
        yield "requests for cpu and memory and a limit for memory are needed"


def accounts_have_no_rights(documents: Sequence[Document]) -> Iterator[str]:
    for document in of_kind(documents, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield f"{title(document)}: nothing here needs rights on the Kubernetes API"
    for document in of_kind(documents, "ServiceAccount"):
        if document.get("automountServiceAccountToken") is not False:
            yield f"{title(document)}: automountServiceAccountToken must be false"
