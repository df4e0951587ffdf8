"""Names and numbers that one document gives and another has to have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

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
    """Where an address stands, and the address."""
    for where, config in serve_configs(documents):
        for application in config.get("applications", []):
            yield from _of_sources(where, application["args"].get("sources", []))
    for document in of_kind(documents, "ConfigMap"):
        if "recipe.yaml" in document["data"]:
            recipe = yaml.safe_load(document["data"]["recipe.yaml"])
            yield f"{title(document)}, service", recipe["service"]["address"]
            yield from _of_sources(title(document), recipe["sources"])
            beside = {"recall": recipe.get("recall", {}), "reward": recipe.get("reward", {}).get("serve", {})}
            yield from ((f"{title(document)}, {name}", s["address"]) for name, s in beside.items() if "address" in s)
        if "envoy.yaml" in document["data"]:
            yield from _of_envoy(title(document), yaml.safe_load(document["data"]["envoy.yaml"]))
    for document in of_kind(documents, "RayService", "RayJob"):
        if address := ray_cluster(document).get("gcsFaultToleranceOptions", {}).get("redisAddress"):
            yield f"{title(document)}, redisAddress", address
    for pod in pods(documents):
        for container in pod.containers():
            for option, value in itertools.pairwise(container.get("args", [])):
                if option == "--health":
                    yield f"{pod.name}, {container['name']}", value


def _of_sources(where: str, sources: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for source in sources:
        yield f"{where}, source {source['name']}", source["address"]


def _of_envoy(where: str, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for cluster in config["static_resources"]["clusters"]:
        for group in cluster["load_assignment"]["endpoints"]:
            for endpoint in group["lb_endpoints"]:
                to = endpoint["endpoint"]["address"]["socket_address"]
                yield f"{where}, cluster {cluster['name']}", f"{to['address']}:{to['port_value']}"


def ports_exist(documents: Sequence[Document]) -> Iterator[str]:
    """Probes, Ray's own settings, Serve's listeners and Services all mean ports that the container declares."""
    for pod in pods(documents):
        for container in pod.spec["containers"]:
            yield from _probe_problems(f"{pod.name}, {container['name']}", container)
        declared = _declared(pod.spec["containers"][0])
        for parameter, name in (("node-manager-port", "raylet"), ("metrics-export-port", "metrics")):
            if (given := pod.start_params.get(parameter)) is not None and int(given) != declared.get(name):
                yield f"{pod.name}: rayStartParams {parameter} is {given}, port {name} is {declared.get(name)}"
    for document in of_kind(documents, "RayService"):
        yield from _listener_problems(document, [pod for pod in pods(documents) if pod.owner == title(document)])
    for document in of_kind(documents, "Service"):
        for pod in pods(documents):
            if matches({"matchLabels": document["spec"]["selector"]}, pod.labels):
                yield from _service_problems(document, pod)


def _declared(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


def _probe_problems(where: str, container: dict[str, Any]) -> Iterator[str]:
    declared = _declared(container)
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for handler in container.get(kind, {}).values():
            port = handler.get("port") if isinstance(handler, dict) else None
            if port is not None and port not in declared and port not in declared.values():
                yield f"{where}: {kind} asks port {port}, which is not declared"


def _listener_problems(document: Document, members: Sequence[Pod]) -> Iterator[str]:
    config = yaml.safe_load(document["spec"]["serveConfigV2"]) or {}
    offered = {port["name"]: port["port"] for port in document["spec"]["serveService"]["spec"]["ports"]}
    for name, options in (("serve", "http_options"), ("serve-grpc", "grpc_options")):
        port, service = config.get(options, {}).get("port"), offered.get(name)
        for pod in members:
            ours = _declared(pod.spec["containers"][0]).get(name)
            if not ours == service == port:
                yield f"{pod.name}: port {name} is {ours}, Serve listens on {port}, the Service has {service}"


def _service_problems(document: Document, pod: Pod) -> Iterator[str]:
    known: set[Any] = set()
    for container in pod.spec["containers"]:
        known |= _declared(container).keys() | set(_declared(container).values())
    for port in document["spec"]["ports"]:
        if (wanted := port.get("targetPort", port["port"])) not in known:
            yield f"{title(document)}: {pod.name} declares no port {wanted}"


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
