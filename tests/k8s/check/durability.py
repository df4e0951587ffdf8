"""What costs work when it is wrong: deadlines, budgets, readiness, requests, and the way to an object store."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from services.deploy.k8s.cluster_recipe import GRPC_PORT, object_stores, port_of_store, stored_models
from services.deploy.k8s.pods import RAYLET_PORT
from services.recipes.recipe import Recipe
from services.recipes.resolve import models_to_fetch
from services.source.config import SourceConfig
from tests.k8s.check.manifests import Document, matches, names, of_kind, pods, ray_cluster, title

_OBJECT_STORE = {"name": "object-store", "optional": True}
_ENVIRONMENT = {"name": "fusion-environment", "optional": True}
_NODES_SECONDS = 3600
"""What a node may need to come up, beside everything that is waited for."""


def deadlines_cover_waits(documents: Sequence[Document]) -> Iterator[str]:
    """The deadline of a RayJob counts from its start, so it must cover preparing and the waits of its pods."""
    preparing = max((d["spec"].get("activeDeadlineSeconds", 0) for d in of_kind(documents, "Job")), default=0)
    waits = {pod.owner: 0 for pod in pods(documents)}
    for pod in pods(documents):
        for container in pod.spec.get("initContainers", []):
            for option, value in itertools.pairwise(container.get("args", [])):
                if option == "--timeout-seconds":
                    waits[pod.owner] = max(waits[pod.owner], int(value))
    for owner, seconds in waits.items():
        if 0 < seconds < preparing:
            yield f"{owner}: waits {seconds} s at most, the preparing job may take {preparing}"
    for document in of_kind(documents, "RayJob"):
        spec, longest = document["spec"], max([preparing, *waits.values()])
        for key in ("preRunningDeadlineSeconds", "activeDeadlineSeconds"):
            if (given := spec.get(key)) is not None and given < longest + _NODES_SECONDS:
                yield f"{title(document)}: {key} is {given}, but its pods and what they wait for may take {longest} s"


def budgets_let_nodes_drain(documents: Sequence[Document]) -> Iterator[str]:
    """Where a head's state is in Redis, no budget may hold the head; a budget counts pods that can become ready."""
    for budget in of_kind(documents, "PodDisruptionBudget"):
        selector, smallest = budget["spec"]["selector"], budget["spec"].get("minAvailable")
        for document in of_kind(documents, "RayService"):
            own = [pod for pod in pods([document]) if matches(selector, pod.labels)]
            if "gcsFaultToleranceOptions" in ray_cluster(document) and any(pod.group == "head" for pod in own):
                yield f"{title(budget)}: no node with a head could be drained, though the head's state is in Redis"
            source, pods_each = _pods_of_a_replica(document)
            workers = [pod for pod in own if pod.group == "worker"]
            if source is None or not workers or pods_each == 1:
                continue
            fewest = source.autoscaling.min_replicas if source.autoscaling else source.num_replicas
            if smallest != max(pods_each, (fewest - 1) * pods_each):
                yield f"{title(budget)}: minAvailable {smallest} is not that of {fewest} replicas of {pods_each} pods"


def followers_get_ready(documents: Sequence[Document]) -> Iterator[str]:
    """Serve has no proxy on a pod that holds only other workers of a replica: such pods are ready as Ray nodes."""
    for document in of_kind(documents, "RayService"):
        _, pods_each = _pods_of_a_replica(document)
        probe = _worker(document).get("readinessProbe", {}).get("grpc", {}).get("port")
        expected = RAYLET_PORT if pods_each > 1 else GRPC_PORT
        if probe != expected:
            yield f"{title(document)}: a replica fills {pods_each} pods, so readiness is port {expected}, not {probe}"


def requests_follow_the_recipe(documents: Sequence[Document]) -> Iterator[str]:
    """CPUs and memory that a recipe names are what the pod asks for, and a trainer's CPUs are not throttled."""
    for document in of_kind(documents, "RayService"):
        asked, container = _arguments(document), _worker(document)
        args = asked.get("service", asked)
        yield from _request_problems(title(document), container, args.get("num_cpus"), args.get("memory"))
    if (recipe := _recipe(documents)) is None:
        return
    for document in of_kind(documents, "RayJob"):
        distill, container = recipe.distill, _worker(document)
        yield from _request_problems(title(document), container, distill.cpus_per_worker, distill.memory_per_worker)
        if "cpu" in container["resources"].get("limits", {}):
            yield f"{title(document)}: a limit on CPU throttles the trainer"
    for pod in pods(documents):
        for container in pod.spec["containers"] if pod.owner.startswith("Ray") and pod.group != "submitter" else []:
            if "ephemeral-storage" not in container["resources"].get("requests", {}):
                yield f"{pod.name}, {container['name']}: a request for ephemeral-storage is needed"


def object_stores_are_reached(documents: Sequence[Document]) -> Iterator[str]:
    """A recipe with URLs needs a way out for those who read and write there, and their credentials."""
    recipe = _recipe(documents)
    if recipe is None or not (urls := [*object_stores(recipe), *stored_models(recipe)]):
        return
    ports = set(map(port_of_store, urls))
    roles = {"fusion", "distill"} if object_stores(recipe) else set()
    roles |= {"prepare"} if stored_models(recipe) or "://" in recipe.corpus.folder else set()
    if "object-store" not in names(documents, "NetworkPolicy"):
        yield "the recipe keeps data in an object store, and no pod may leave to it: component object-store is missing"
        return
    [policy] = [d for d in of_kind(documents, "NetworkPolicy") if d["metadata"]["name"] == "object-store"]
    open_ = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    if missing := ports - open_:
        yield f"{title(policy)}: port {min(missing)} of the object store is shut"
    for pod in pods(documents):
        if pod.role not in roles or pod.group == "submitter":
            continue
        if (pod.role, pod.group) == ("fusion", "head"):
            continue  # replicas run on workers only
        for container in pod.spec["containers"]:
            if _OBJECT_STORE not in [entry.get("secretRef") for entry in container.get("envFrom", [])]:
                yield f"{pod.name}, {container['name']}: the Secret object-store does not reach it"


def models_are_fetched(documents: Sequence[Document]) -> Iterator[str]:
    """A recipe with models of a hub needs their token where there is one, and the site's mirror and proxy, in the job
    that fetches them."""
    recipe = _recipe(documents)
    if recipe is None or not [name for name in models_to_fetch(recipe) if name.startswith("hf://")]:
        return
    for pod in pods(documents):
        for container in pod.spec["containers"] if pod.role == "prepare" else []:
            token = next((v.get("valueFrom") for v in container.get("env", []) if v["name"] == "HF_TOKEN"), None)
            if token != {"secretKeyRef": {"name": "model-hub", "key": "token", "optional": True}}:
                yield f"{pod.name}: the token of the Secret model-hub does not reach it, gated models cannot be fetched"
            if _ENVIRONMENT not in [entry.get("configMapRef") for entry in container.get("envFrom", [])]:
                yield f"{pod.name}: the ConfigMap fusion-environment does not reach it, nor a mirror or proxy"


def _worker(document: Document) -> dict[str, Any]:
    container: dict[str, Any] = ray_cluster(document)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    return container


def _arguments(document: Document) -> dict[str, Any]:
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    arguments: dict[str, Any] = config["applications"][0]["args"]
    return arguments


def _pods_of_a_replica(document: Document) -> tuple[SourceConfig | None, int]:
    """The source that a RayService serves, and how many of its pods a replica fills, by the GPUs that each has."""
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    [application, *_] = config["applications"]
    if application["import_path"] != "services.source.app:build":
        return None, 1
    try:
        source = SourceConfig.model_validate(application["args"])
    except ValueError:
        return None, 1  # another rule says so
    limits = _worker(document)["resources"].get("limits", {})
    gpus = sum(int(amount) for name, amount in limits.items() if "/" in name)
    return source, math.ceil(source.num_gpus / gpus) if source.places_workers and gpus else 1


def _recipe(documents: Sequence[Document]) -> Recipe | None:
    for document in of_kind(documents, "ConfigMap"):
        if "recipe.yaml" in document.get("data", {}):
            try:
                return Recipe.model_validate(yaml.safe_load(document["data"]["recipe.yaml"]))
            except ValueError:
                return None  # another rule says so
    return None


def _request_problems(
    where: str, container: dict[str, Any], num_cpus: float | None, memory: str | None
) -> Iterator[str]:
    asked = container["resources"].get("requests", {})
    if num_cpus is not None and asked.get("cpu") != str(max(1, math.ceil(num_cpus))):
        yield f"{where}: the recipe has {num_cpus:g} CPUs, the pod asks for {asked.get('cpu')}"
    if memory is not None and asked.get("memory") != memory:
        yield f"{where}: the recipe has {memory} of memory, the pod asks for {asked.get('memory')}"
