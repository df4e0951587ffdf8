"""What Ray is told: Serve configs, sizes, versions, and the commands that pods run."""

from __future__ import annotations

import importlib
import importlib.metadata
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

from services.base.settings import explain
from services.cli.app import app as command_line
from services.deploy.k8s.cluster_recipe import GRPC_PORT, LONGEST_RAY_NAME
from services.fusion.config import FusionServiceConfig
from services.recall.config import RecallConfig
from services.recipes.recipe import Recipe
from services.reward.config import RewardServiceConfig
from services.source.config import SourceConfig
from services.wire.protocol import MAX_MESSAGE_BYTES
from tests.k8s.check.manifests import Document, matches, of_kind, pods, ray_cluster, serve_configs, title

_ARGUMENTS: dict[str, type[BaseModel]] = {
    "services.source.app:build": SourceConfig,
    "services.fusion.app:build": FusionServiceConfig,
    "services.recall.app:build": RecallConfig,
    "services.reward.app:build": RewardServiceConfig,
}


def imports_work(documents: Sequence[Document]) -> Iterator[str]:
    """What Serve and the job import is there: applications, servicer functions, the module of the entrypoint."""
    for where, config in serve_configs(documents):
        functions = config.get("grpc_options", {}).get("grpc_servicer_functions", [])
        targets = [application["import_path"].replace(":", ".") for application in config.get("applications", [])]
        for target in [*functions, *targets]:
            module, _, attribute = target.rpartition(".")
            try:
                found = callable(getattr(importlib.import_module(module), attribute, None))
            except ImportError:
                found = False
            if not found:
                yield f"{where}: {target} cannot be imported"


def messages_are_bounded(documents: Sequence[Document]) -> Iterator[str]:
    """Serve's proxy takes messages of 2 GiB unless its environment says otherwise."""
    for pod in pods(documents):
        if not pod.owner.startswith("RayService"):
            continue
        for container in pod.spec["containers"]:
            given = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
            if given.get("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE") != str(MAX_MESSAGE_BYTES):
                yield f"{pod.name}, {container['name']}: RAY_SERVE_GRPC_MAX_MESSAGE_SIZE must be {MAX_MESSAGE_BYTES}"


def serve_configs_hold(documents: Sequence[Document]) -> Iterator[str]:
    """Serve's own schema, and what it lets through: unknown keys, impossible bounds, arguments that do not validate."""
    for where, config in serve_configs(documents):
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            yield f"{where}: serveConfigV2: {error.errors()[0]['msg']}"
            continue
        yield from (f"{where}: serveConfigV2: {problem}" for problem in _unknown(ServeDeploySchema, config, ""))
        if config.get("proxy_location") != "EveryNode":
            yield f"{where}: proxy_location must be EveryNode: every ready pod is called"
        if config.get("grpc_options", {}).get("port") != GRPC_PORT:
            yield f"{where}: grpc_options.port must be {GRPC_PORT}"
        if (number := len(config["applications"])) != 1:
            yield f"{where}: {number} applications; stock probes name none, so there must be exactly one"
        for application in config["applications"]:
            yield from (f"{where}: {problem}" for problem in _application_problems(application))


def _application_problems(application: dict[str, Any]) -> Iterator[str]:
    model = _ARGUMENTS.get(application["import_path"])
    if model is None:
        yield f"{application['name']}: import_path {application['import_path']} is none of {', '.join(_ARGUMENTS)}"
        return
    try:
        args = model.model_validate(application["args"])
    except ValidationError as error:
        yield f"args of {application['name']}: {explain(error)}"
        return
    if isinstance(args, SourceConfig) and args.name != application["name"]:
        yield f"application {application['name']} serves source {args.name}"


def _unknown(model: Any, value: Any, where: str) -> Iterator[str]:
    """Keys that a pydantic model of Serve's would ignore."""
    for key, part in value.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}{key} is no setting of Serve"
            continue
        inner = next((found for found in _models(field.annotation)), None)
        for index, item in enumerate(part if isinstance(part, list) else [part]):
            if inner is not None and isinstance(item, dict):
                yield from _unknown(
                    inner, item, f"{where}{key}[{index}]." if isinstance(part, list) else f"{where}{key}."
                )


def _models(annotation: Any) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def sizes_fit(documents: Sequence[Document]) -> Iterator[str]:
    """Bounds of worker groups, Serve's replicas and disruption budgets agree; a worker has room for one replica."""
    for document in of_kind(documents, "RayService", "RayJob"):
        cluster = ray_cluster(document)
        for group in cluster["workerGroupSpecs"]:
            low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
            if not low <= max(low, now) <= high:
                yield f"{title(document)}: replicas {now} are not within {low} to {high}"
        if document["kind"] == "RayService" and not list(serve_configs_hold([document])):
            yield from _replica_problems(document, cluster["workerGroupSpecs"][0])
    for budget in of_kind(documents, "PodDisruptionBudget"):
        smallest = budget["spec"]["minAvailable"]
        if not isinstance(smallest, int):
            yield f"{title(budget)}: minAvailable must be a number: Ray's pods have no controller with a scale"
            continue
        running = sum(pod.replicas for pod in pods(documents) if matches(budget["spec"]["selector"], pod.labels))
        if smallest > running:
            yield f"{title(budget)}: minAvailable {smallest} is more than the {running} pods that it selects"


def _replica_problems(document: Document, group: dict[str, Any]) -> Iterator[str]:
    resources = group["template"]["spec"]["containers"][0]["resources"]
    most_pods = group["maxReplicas"]
    gpus = sum(int(amount) for name, amount in resources.get("limits", {}).items() if "/" in name)
    for application in yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]:
        args = _ARGUMENTS[application["import_path"]].model_validate(application["args"])
        if isinstance(args, SourceConfig):
            replicas, cpus, needed = args.most_replicas, args.num_cpus, args.num_gpus
            at_once = 1 if args.places_workers else needed
            autoscaled = args.autoscaling is not None
        elif isinstance(args, RecallConfig):
            replicas, cpus = args.num_replicas, args.num_cpus
            needed = at_once = int(args.num_gpus > 0)
            autoscaled = False
        elif isinstance(args, RewardServiceConfig):
            replicas, cpus, needed = args.num_replicas, args.num_cpus, args.num_gpus
            at_once, autoscaled = needed, False
        else:
            assert isinstance(args, FusionServiceConfig), "no other kind is served"
            replicas, cpus = args.service.num_replicas, args.service.num_cpus
            needed, at_once, autoscaled = 0, 0, False
        if replicas > most_pods:
            yield f"{title(document)}: {replicas} replicas, but at most {most_pods} worker pods"
        if cpus > float(group["rayStartParams"]["num-cpus"]):
            yield f"{title(document)}: a replica takes {cpus:g} CPUs, a pod has {group['rayStartParams']['num-cpus']}"
        if at_once > gpus or replicas * needed > most_pods * gpus:
            yield f"{title(document)}: {replicas} replicas take {needed:g} GPUs each, {most_pods} pods have {gpus}"
        if autoscaled != bool(ray_cluster(document).get("enableInTreeAutoscaling")):
            yield f"{title(document)}: enableInTreeAutoscaling does not go with the source's autoscaling"


def ray_versions_agree(documents: Sequence[Document]) -> Iterator[str]:
    """KubeRay is told the Ray that the image holds; names leave room for what KubeRay appends."""
    installed = importlib.metadata.version("ray")
    for document in of_kind(documents, "RayService", "RayJob"):
        cluster = ray_cluster(document)
        if cluster.get("rayVersion") != installed:
            yield f"{title(document)}: rayVersion is {cluster.get('rayVersion')}, the requirements have {installed}"
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{title(document)}: authOptions.mode must be token"
        if len(document["metadata"]["name"]) > LONGEST_RAY_NAME:
            yield f"{title(document)}: KubeRay takes names of at most {LONGEST_RAY_NAME} characters"


def commands_are_ours(documents: Sequence[Document]) -> Iterator[str]:
    """The job's entrypoint and what init containers run are commands of this tree, with options that it has."""
    for pod in pods(documents):
        for container in pod.containers():
            words = container.get("args", [])
            if words[:1] == ["fusion"] and (problem := _command_problem(words[1:])):
                yield f"{pod.name}, {container['name']}: {shlex.join(words)}: {problem}"
            if container["name"] == "wait" and not words:
                yield f"{pod.name}, {container['name']}: waits for nothing"
    for document in of_kind(documents, "RayJob"):
        yield from (f"{title(document)}: {problem}" for problem in _entrypoint_problems(document, documents))


def _command_problem(words: Sequence[str]) -> str:
    command: Any = get_command(command_line)
    rest = list(words)
    try:
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context("fusion", rest)
    except (KeyError, IndexError):
        return "no such command"
    except Exception as error:  # of click, which typer carries inside
        return str(error)
    return ""


def _entrypoint_problems(document: Document, documents: Sequence[Document]) -> Iterator[str]:
    words = shlex.split(document["spec"]["entrypoint"])
    if words[:3] != ["python", "-m", "services.distill"]:
        yield f"entrypoint {shlex.join(words[:3])} is not the training job"
        return
    folder, _, key = words[words.index("--recipe") + 1].rpartition("/")
    head = ray_cluster(document)["headGroupSpec"]["template"]["spec"]
    volume = next((m["name"] for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == folder), None)
    names = [v["configMap"]["name"] for v in head["volumes"] if v["name"] == volume and "configMap" in v]
    found = [d for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] in names and key in d["data"]]
    if not found:
        yield f"{folder}/{key} is in no ConfigMap that is mounted there"
        return
    try:
        Recipe.model_validate(yaml.safe_load(found[0]["data"][key]))
    except ValidationError as error:
        yield f"{key}: {explain(error)}"
