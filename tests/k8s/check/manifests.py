"""What `kubectl kustomize` gives for an overlay, and the pods that KubeRay and Kubernetes would make of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[3]
Document = dict[str, Any]


class MissingToolError(RuntimeError):
    """A program that the check runs is not on this machine."""


def kustomize(folder: Path) -> list[Document]:
    """The documents of an overlay; raises ValueError with kustomize's words when it cannot be built."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise MissingToolError("kubectl is not on PATH; version 1.27 or newer is needed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{folder}: {done.stderr.strip()}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def overlay(name: str, k8s: Path = REPOSITORY / "k8s") -> list[Document]:
    return kustomize(k8s / "overlays" / name)


@dataclass(frozen=True)
class Pod:
    """A pod as it would run: labels that KubeRay adds included."""

    owner: str
    group: str
    labels: dict[str, str]
    spec: dict[str, Any]
    start_params: dict[str, str] = field(default_factory=dict)
    replicas: int = 1

    @property
    def name(self) -> str:
        return f"{self.owner} {self.group}".strip()

    @property
    def role(self) -> str:
        return self.labels.get("llm-fusion/role", "")

    @property
    def cluster(self) -> tuple[str, str]:
        """Pods with the same value belong to one Ray cluster."""
        return self.role, self.labels.get("llm-fusion/source", "")

    def containers(self) -> Iterator[dict[str, Any]]:
        yield from self.spec.get("initContainers", [])
        yield from self.spec["containers"]


def title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def of_kind(documents: Sequence[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def names(documents: Sequence[Document], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def ray_cluster(document: Document) -> dict[str, Any]:
    """The cluster of a RayService or a RayJob."""
    spec = document["spec"]
    cluster: dict[str, Any] = spec["rayClusterConfig"] if document["kind"] == "RayService" else spec["rayClusterSpec"]
    return cluster


def pods(documents: Sequence[Document]) -> list[Pod]:
    """All pods that the documents lead to, one per template."""
    found: list[Pod] = []
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        if kind in {"RayService", "RayJob"}:
            found += _ray_pods(document)
        elif kind in {"Deployment", "StatefulSet", "Job"}:
            template = spec["template"]
            labels = template["metadata"].get("labels", {})
            found.append(Pod(title(document), "", labels, template["spec"], replicas=spec.get("replicas", 1)))
    return found


def _ray_pods(document: Document) -> Iterator[Pod]:
    cluster, owner = ray_cluster(document), title(document)
    groups = [("head", "head", cluster["headGroupSpec"], 1)]
    groups += [
        ("worker", group["groupName"], group, group["replicas"]) for group in cluster.get("workerGroupSpecs", [])
    ]
    for node_type, name, group, replicas in groups:
        added = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node_type, "ray.io/group": name}
        if document["kind"] == "RayService":
            added["ray.io/serve"] = "false" if node_type == "head" else "true"
        template = group["template"]
        labels = {**template["metadata"].get("labels", {}), **added}
        yield Pod(owner, node_type, labels, template["spec"], group.get("rayStartParams", {}), replicas)
    if "submitterPodTemplate" in document["spec"]:
        template = document["spec"]["submitterPodTemplate"]
        yield Pod(owner, "submitter", template["metadata"].get("labels", {}), template["spec"])


def matches(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Kubernetes' label selector; an empty one takes all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        value, operator = labels.get(rule["key"]), rule["operator"]
        held = {
            "In": value in rule.get("values", []),
            "NotIn": value not in rule.get("values", []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[operator]
        if not held:
            return False
    return True


def serve_configs(documents: Sequence[Document]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Title and parsed Serve config of every RayService."""
    for document in of_kind(documents, "RayService"):
        yield title(document), yaml.safe_load(document["spec"]["serveConfigV2"]) or {}


def service_ports(documents: Sequence[Document]) -> dict[str, set[int]]:
    """Ports of every Service by its name, those that KubeRay makes from serveService included."""
    found = {}
    for document in of_kind(documents, "Service"):
        found[document["metadata"]["name"]] = {port["port"] for port in document["spec"]["ports"]}
    for document in of_kind(documents, "RayService"):
        service = document["spec"]["serveService"]
        found[service["metadata"]["name"]] = {port["port"] for port in service["spec"]["ports"]}
    return found
