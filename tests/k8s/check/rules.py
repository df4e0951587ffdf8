"""Cross-checks between the documents of one overlay: each rule yields a sentence per problem."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

from services.cli import app as command_line
from services.common.settings import explain
from services.fusion.config import FusionServiceConfig
from services.k8s.cluster_recipe import GRPC_PORT
from services.recipes.recipe import Recipe
from services.source.config import SourceConfig
from tests.k8s.check.manifests import (
    Document,
    Pod,
    matches,
    names,
    of_kind,
    pods,
    ray_cluster,
    serve_configs,
    service_ports,
    title,
)
from tests.k8s.check.readme import drawn_edges, site_secrets

VERSION = importlib.metadata.version("llm-fusion")
Rule = Callable[[Sequence[Document]], Iterator[str]]

_ARGUMENTS: dict[str, type[BaseModel]] = {
    "services.source.app:build": SourceConfig,
    "services.fusion.app:build": FusionServiceConfig,
}


def references_exist(documents: Sequence[Document]) -> Iterator[str]:
    """ConfigMaps, Secrets, claims, service accounts and volumes that a pod names."""
    there = {kind: names(documents, kind) for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount")}
    there["Secret"] = names(documents, "Secret") | site_secrets()
    for pod in pods(documents):
        for kind, name in _references(pod):
            if name not in there[kind]:
                yield f"{pod.name}: {kind} {name} does not exist"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | _claim_templates(documents, pod)
        for container in pod.containers():
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.name}, {container['name']}: volume {mount['name']} does not exist"
    for document in of_kind(documents, "RayService", "RayJob"):
        password = ray_cluster(document).get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
        name = password.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
        if name and name not in there["Secret"]:
            yield f"{title(document)}: Secret {name} does not exist"


def _references(pod: Pod) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod.spec.get("serviceAccountName", "default")
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers():
        for source in container.get("envFrom", []):
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source and not source[key].get("optional"):
                    yield kind, source[key]["name"]
        for variable in container.get("env", []):
            for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if key in variable.get("valueFrom", {}):
                    yield kind, variable["valueFrom"][key]["name"]


def _claim_templates(documents: Sequence[Document], pod: Pod) -> set[str]:
    return {
        claim["metadata"]["name"]
        for document in of_kind(documents, "StatefulSet")
        if title(document) == pod.owner
        for claim in document["spec"].get("volumeClaimTemplates", [])
    }


def addresses_exist(documents: Sequence[Document]) -> Iterator[str]:
    """Every host:port that something is told to call is a Service of the overlay, or a full name from outside."""
    ports = service_ports(documents)
    for where, address in _addresses(documents):
        host, _, port = address.rpartition(":")
        if "." in host:
            continue
        if host not in ports:
            yield f"{where}: no Service is called {host}"
        elif int(port) not in ports[host]:
            yield f"{where}: Service {host} has no port {port}"


def _addresses(documents: Sequence[Document]) -> Iterator[tuple[str, str]]:
    for where, config in serve_configs(documents):
        for application in config.get("applications", []):
            for source in application["args"].get("sources", []):
                yield f"{where}, source {source['name']}", source["address"]
    for document in of_kind(documents, "ConfigMap"):
        if "recipe.yaml" in document["data"]:
            recipe = yaml.safe_load(document["data"]["recipe.yaml"])
            yield f"{title(document)}, service", recipe["service"]["address"]
            for source in recipe["sources"]:
                yield f"{title(document)}, source {source['name']}", source["address"]
        if "envoy.yaml" in document["data"]:
            for cluster in yaml.safe_load(document["data"]["envoy.yaml"])["static_resources"]["clusters"]:
                for group in cluster["load_assignment"]["endpoints"]:
                    for endpoint in group["lb_endpoints"]:
                        to = endpoint["endpoint"]["address"]["socket_address"]
                        yield f"{title(document)}, cluster {cluster['name']}", f"{to['address']}:{to['port_value']}"
    for document in of_kind(documents, "RayService", "RayJob"):
        if address := ray_cluster(document).get("gcsFaultToleranceOptions", {}).get("redisAddress"):
            yield f"{title(document)}, redisAddress", address
    for pod in pods(documents):
        for container in pod.containers():
            words = container.get("args", [])
            for option, value in zip(words, words[1:], strict=False):
                if option == "--health":
                    yield f"{pod.name}, {container['name']}", value


def ports_exist(documents: Sequence[Document]) -> Iterator[str]:
    """Probes, Ray's own settings, Serve's listeners and Services all mean ports that the container declares."""
    everyone = pods(documents)
    for pod in everyone:
        for container in pod.spec["containers"]:
            declared = {port.get("name", ""): port["containerPort"] for port in container.get("ports", [])}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                for handler in container.get(kind, {}).values():
                    port = handler.get("port") if isinstance(handler, dict) else None
                    if port is not None and port not in declared and port not in declared.values():
                        yield f"{pod.name}, {container['name']}: {kind} asks port {port}, which is not declared"
        declared = {port.get("name", ""): port["containerPort"] for port in pod.spec["containers"][0].get("ports", [])}
        for parameter, name in (("node-manager-port", "raylet"), ("metrics-export-port", "metrics")):
            if (given := pod.start_params.get(parameter)) is not None and int(given) != declared.get(name):
                yield f"{pod.name}: rayStartParams {parameter} is {given}, port {name} is {declared.get(name)}"
    for document in of_kind(documents, "RayService"):
        config = yaml.safe_load(document["spec"]["serveConfigV2"]) or {}
        listeners = {
            "serve": config.get("http_options", {}).get("port"),
            "serve-grpc": config.get("grpc_options", {}).get("port"),
        }
        offered = {port["name"]: port["port"] for port in document["spec"]["serveService"]["spec"]["ports"]}
        for pod in everyone:
            if pod.owner != title(document):
                continue
            declared = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
            for name, port in listeners.items():
                if not declared.get(name) == offered.get(name) == port:
                    ours, service = declared.get(name), offered.get(name)
                    yield f"{pod.name}: port {name} is {ours}, Serve listens on {port}, the Service has {service}"
    for document in of_kind(documents, "Service"):
        selector = {"matchLabels": document["spec"]["selector"]}
        for pod in everyone:
            if matches(selector, pod.labels):
                open_ports = [port for container in pod.spec["containers"] for port in container.get("ports", [])]
                known = {value for port in open_ports for value in (port.get("name"), port["containerPort"])}
                for port in document["spec"]["ports"]:
                    if port.get("targetPort", port["port"]) not in known:
                        yield f"{title(document)}: {pod.name} declares no port {port.get('targetPort', port['port'])}"


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


def serve_configs_hold(documents: Sequence[Document]) -> Iterator[str]:
    """Serve's own schema, and what it lets through: unknown keys, impossible bounds, arguments that do not validate."""
    for where, config in serve_configs(documents):
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            yield f"{where}: serveConfigV2: {error.errors()[0]['msg']}"
            continue
        yield from (f"{where}: serveConfigV2: {problem}" for problem in _unknown(ServeDeploySchema, config, ""))
        applications = config["applications"]
        if len(applications) != 1:
            yield f"{where}: {len(applications)} applications; stock probes name none, so there must be exactly one"
        if config.get("proxy_location") != "EveryNode":
            yield f"{where}: proxy_location must be EveryNode: every ready pod is called"
        if config.get("grpc_options", {}).get("port") != GRPC_PORT:
            yield f"{where}: grpc_options.port must be {GRPC_PORT}"
        for application in applications:
            model = _ARGUMENTS.get(application["import_path"])
            try:
                args = model.model_validate(application["args"]) if model else None
            except ValidationError as error:
                yield f"{where}: args of {application['name']}: {explain(error)}"
                continue
            if isinstance(args, SourceConfig) and args.name != application["name"]:
                yield f"{where}: application {application['name']} serves source {args.name}"


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
        if document["kind"] == "RayService":
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
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    for application in config["applications"]:
        args = application["args"]
        settings = args if "model" in args else args["service"]
        replicas, cpus = settings.get("num_replicas", 1), settings.get("num_cpus", 1)
        if not settings.get("autoscaling") and replicas > group["maxReplicas"]:
            yield f"{title(document)}: {replicas} replicas, but at most {group['maxReplicas']} worker pods"
        if cpus > float(group["rayStartParams"]["num-cpus"]):
            yield f"{title(document)}: a replica takes {cpus} CPUs, a pod has {group['rayStartParams']['num-cpus']}"
        resources = group["template"]["spec"]["containers"][0]["resources"]
        gpus = int(resources.get("limits", {}).get("nvidia.com/gpu", 0))
        if settings.get("num_gpus", 0) > gpus:
            yield f"{title(document)}: a replica takes {settings['num_gpus']:g} GPUs, a pod has {gpus}"


def selectors_match(documents: Sequence[Document]) -> Iterator[str]:
    """Services, budgets, workloads and policies select pods that there are."""
    everyone = pods(documents)
    for document in documents:
        kind, spec = document["kind"], document.get("spec", {})
        if kind == "Service":
            selector: dict[str, Any] = {"matchLabels": spec["selector"]}
        elif kind in {"PodDisruptionBudget", "Deployment", "StatefulSet", "PodMonitor"}:
            selector = spec["selector"]
        elif kind == "NetworkPolicy":
            selector = spec["podSelector"]
            if selector.get("matchLabels", {}).get("llm-fusion/role") in _drawn_roles():
                continue  # pods of the site, or sources that a recipe has elsewhere
        else:
            continue
        if not any(matches(selector, pod.labels) for pod in everyone):
            yield f"{title(document)}: selects no pod"


def _drawn_roles() -> set[str]:
    return {end for edge in drawn_edges() for end in (edge.source, edge.target)}


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
            where = f"{pod.name}, {container['name']}"
            inner = container.get("securityContext", {})
            if inner.get("allowPrivilegeEscalation") is not False or inner.get("privileged"):
                yield f"{where}: allowPrivilegeEscalation must be false"
            if inner.get("readOnlyRootFilesystem") is not True:
                yield f"{where}: readOnlyRootFilesystem must be true"
            if inner.get("capabilities", {}).get("drop") != ["ALL"] or inner.get("capabilities", {}).get("add"):
                yield f"{where}: all capabilities must be dropped"
            resources = container.get("resources", {})
            if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get(
                "limits", {}
            ):
                yield f"{where}: requests for cpu and memory and a limit for memory are needed"
        if pod.group == "submitter" or pod.owner.startswith("Job "):
            continue  # they end by themselves
        for container in pod.spec["containers"]:
            missing = [kind for kind in ("readinessProbe", "livenessProbe") if kind not in container]
            if missing:
                yield f"{pod.name}, {container['name']}: {' and '.join(missing)} missing"


def accounts_have_no_rights(documents: Sequence[Document]) -> Iterator[str]:
    for document in of_kind(documents, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield f"{title(document)}: nothing here needs rights on the Kubernetes API"
    for document in of_kind(documents, "ServiceAccount"):
        if document.get("automountServiceAccountToken") is not False:
            yield f"{title(document)}: automountServiceAccountToken must be false"


def ray_versions_agree(documents: Sequence[Document]) -> Iterator[str]:
    """KubeRay is told the Ray that the image holds; names leave room for what KubeRay appends."""
    installed = importlib.metadata.version("ray")
    for document in of_kind(documents, "RayService", "RayJob"):
        cluster = ray_cluster(document)
        if cluster.get("rayVersion") != installed:
            yield f"{title(document)}: rayVersion is {cluster.get('rayVersion')}, the requirements have {installed}"
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield f"{title(document)}: authOptions.mode must be token"
        if len(document["metadata"]["name"]) > 47:
            yield f"{title(document)}: KubeRay takes names of at most 47 characters"


def commands_are_ours(documents: Sequence[Document]) -> Iterator[str]:
    """The job's entrypoint and what init containers run are commands of this tree, with options that it has."""
    for pod in pods(documents):
        for container in pod.containers():
            words = container.get("args", [])
            if words[:1] != ["fusion"]:
                continue
            try:
                command: Any = get_command(command_line)
                rest = list(words[1:])
                while hasattr(command, "commands"):
                    command = command.commands[rest.pop(0)]
                command.make_context("fusion", rest)
            except Exception as error:  # click's, KeyError for a command that is not there
                yield f"{pod.name}, {container['name']}: {shlex.join(words)}: {error}"
    for document in of_kind(documents, "RayJob"):
        words = shlex.split(document["spec"]["entrypoint"])
        if words[:3] != ["python", "-m", "services.distill"]:
            yield f"{title(document)}: entrypoint {words[:3]} is not the training job"
            continue
        file = words[words.index("--recipe") + 1]
        mounts = {
            mount["mountPath"]: mount["name"]
            for mount in ray_cluster(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        }
        folder, _, key = file.rpartition("/")
        maps = [d for d in of_kind(documents, "ConfigMap") if key in d["data"]]
        if folder not in mounts or not maps:
            yield f"{title(document)}: {file} is in no mounted ConfigMap"
            continue
        try:
            Recipe.model_validate(yaml.safe_load(maps[0]["data"][key]))
        except ValidationError as error:
            yield f"{title(maps[0])}: {explain(error)}"


RULES: tuple[Rule, ...] = (
    references_exist,
    addresses_exist,
    ports_exist,
    imports_work,
    serve_configs_hold,
    sizes_fit,
    selectors_match,
    images_are_pinned,
    pods_are_confined,
    accounts_have_no_rights,
    ray_versions_agree,
    commands_are_ours,
)
