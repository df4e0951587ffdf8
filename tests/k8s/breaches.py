"""Changes to the documents of the overlay `production` that a rule must catch, with words of its sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from tests.k8s.check.manifests import Document, ray_cluster


def find(documents: list[Document], kind: str, name: str) -> Document:
    """The document of a kind whose name matches a pattern."""
    [document] = [d for d in documents if d["kind"] == kind and re.fullmatch(name, d["metadata"]["name"])]
    return document


def worker(documents: list[Document], service: str = "source-qwen3-8b") -> dict[str, Any]:
    group: dict[str, Any] = ray_cluster(find(documents, "RayService", service))["workerGroupSpecs"][0]
    return group


def container(documents: list[Document], service: str = "source-qwen3-8b") -> dict[str, Any]:
    found: dict[str, Any] = worker(documents, service)["template"]["spec"]["containers"][0]
    return found


def head(documents: list[Document]) -> dict[str, Any]:
    spec: dict[str, Any] = ray_cluster(find(documents, "RayService", "fusion"))["headGroupSpec"]["template"]["spec"]
    return spec


def serve(documents: list[Document], change: Callable[[dict[str, Any]], Any], service: str = "source-qwen3-8b") -> None:
    spec = find(documents, "RayService", service)["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    change(config)
    spec["serveConfigV2"] = yaml.safe_dump(config)


def policy(documents: list[Document], name: str) -> dict[str, Any]:
    spec: dict[str, Any] = find(documents, "NetworkPolicy", name)["spec"]
    return spec


def remove(documents: list[Document], kind: str, name: str) -> None:
    documents.remove(find(documents, kind, name))


def application(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["applications"][0].update(settings)


def args(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["applications"][0]["args"].update(settings)


ALL = {"matchLabels": {"llm-fusion/role": "source"}}
BOTH_WAYS = {"ingress": [{"from": [{"podSelector": ALL}]}], "egress": [{"to": [{"podSelector": ALL}]}]}

BREACHES: dict[str, tuple[Callable[[list[Document]], Any], str]] = {
    "built-in kind, unknown field": (
        lambda d: find(d, "PersistentVolumeClaim", "runs")["spec"].update(accessMode="x"),
        "accessMode",
    ),
    "built-in kind, wrong type": (
        lambda d: find(d, "Deployment", "gateway")["spec"].update(replicas="two"),
        "'two' is not of type",
    ),
    "kind without a schema": (lambda d: find(d, "Job", "prepare-.*").update(kind="Jobb"), "find schema for kind Jobb"),
    "Ray kind, unknown field": (
        lambda d: find(d, "RayService", "fusion")["spec"].update(serveConfig="x"),
        "'serveConfig' was unexpected",
    ),
    "Ray kind, unknown field deep inside": (lambda d: container(d).update(port=1), "'port' was unexpected"),
    "Ray kind, missing field": (lambda d: worker(d).pop("groupName"), "'groupName' is a required property"),
    "Ray kind, not in the enum": (
        lambda d: ray_cluster(find(d, "RayJob", "distill"))["authOptions"].update(mode="off"),
        "'off' is not one of",
    ),
    "ConfigMap": (lambda d: remove(d, "ConfigMap", "fusion-recipe"), "ConfigMap fusion-recipe does not exist"),
    "Secret": (
        lambda d: head(d)["volumes"][1]["secret"].update(secretName="tokens"),
        "Secret tokens does not exist",
    ),
    "Secret of Redis": (
        lambda d: ray_cluster(find(d, "RayService", "fusion"))["gcsFaultToleranceOptions"]["redisPassword"][
            "valueFrom"
        ]["secretKeyRef"].update(name="nowhere"),
        "Secret nowhere does not exist",
    ),
    "claim": (lambda d: remove(d, "PersistentVolumeClaim", "models"), "PersistentVolumeClaim models does not exist"),
    "service account": (lambda d: remove(d, "ServiceAccount", "source"), "ServiceAccount source does not exist"),
    "volume": (lambda d: head(d)["volumes"].pop(0), "volume scratch does not exist"),
    "Service of a source": (
        lambda d: find(d, "RayService", "source-qwen3-8b")["spec"]["serveService"]["metadata"].update(name="other"),
        "no Service is called source-qwen3-8b",
    ),
    "Service of Redis": (lambda d: remove(d, "Service", "redis"), "no Service is called redis"),
    "port of a Service": (
        lambda d: find(d, "Service", "redis")["spec"]["ports"][0].update(port=6380),
        "Service redis has no port 6379",
    ),
    "port behind a Service": (
        lambda d: find(d, "Service", "gateway")["spec"]["ports"][0].update(targetPort="https"),
        "declares no port https",
    ),
    "probe's port": (
        lambda d: container(d)["readinessProbe"]["grpc"].update(port=9001),
        "readinessProbe asks port 9001",
    ),
    "Ray's metrics port": (
        lambda d: worker(d)["rayStartParams"].update({"metrics-export-port": "8081"}),
        "metrics-export-port is 8081",
    ),
    "Serve's gRPC port": (
        lambda d: serve(d, lambda c: c["grpc_options"].update(port=9100)),
        "Serve listens on 9100",
    ),
    "import path": (
        lambda d: serve(d, application(import_path="services.source.app:make")),
        "services.source.app.make cannot be imported",
    ),
    "servicer function": (
        lambda d: serve(d, lambda c: c["grpc_options"].update(grpc_servicer_functions=["fusion.v9.x.add"])),
        "fusion.v9.x.add cannot be imported",
    ),
    "Serve's own schema": (lambda d: serve(d, lambda c: c["http_options"].update(host=[])), "serveConfigV2"),
    "key that Serve would ignore": (
        lambda d: serve(d, application(num_replica=2)),
        "applications[0].num_replica is no setting of Serve",
    ),
    "deep key that Serve would ignore": (
        lambda d: serve(d, lambda c: c["grpc_options"].update(prot=1)),
        "grpc_options.prot is no setting of Serve",
    ),
    "two applications": (
        lambda d: serve(
            d, lambda c: c["applications"].append({**c["applications"][0], "name": "b", "route_prefix": "/b"})
        ),
        "2 applications",
    ),
    "proxies on the head only": (
        lambda d: serve(d, lambda c: c.update(proxy_location="HeadOnly")),
        "proxy_location must be EveryNode",
    ),
    "arguments of a source": (lambda d: serve(d, args(top_q=3)), "args of qwen3-8b: top_q: unknown key"),
    "arguments of the fusion service": (
        lambda d: serve(d, args(sources=[]), "fusion"),
        "args of fusion: sources",
    ),
    "name of a source": (lambda d: serve(d, args(name="qwen")), "application qwen3-8b serves source qwen"),
    "more replicas than pods": (lambda d: serve(d, args(num_replicas=9)), "9 replicas, but at most 2 worker pods"),
    "more CPUs than a pod has": (lambda d: serve(d, args(num_cpus=9)), "a replica takes 9 CPUs"),
    "more GPUs than a pod has": (lambda d: serve(d, args(num_gpus=2)), "2 replicas take 2 GPUs each, 2 pods have 1"),
    "autoscaling that nothing carries out": (
        lambda d: ray_cluster(find(d, "RayService", "fusion")).update(enableInTreeAutoscaling=True),
        "enableInTreeAutoscaling does not go with",
    ),
    "bounds of a worker group": (lambda d: worker(d).update(minReplicas=3), "are not within 3 to 2"),
    "budget that nothing can meet": (
        lambda d: find(d, "PodDisruptionBudget", "source-worker-qwen3-8b")["spec"].update(minAvailable=3),
        "minAvailable 3 is more than the 2 pods",
    ),
    "budget in percent": (
        lambda d: find(d, "PodDisruptionBudget", "fusion-worker")["spec"].update(minAvailable="50%"),
        "minAvailable must be a number",
    ),
    "selector of a budget": (
        lambda d: find(d, "PodDisruptionBudget", "gateway")["spec"]["selector"]["matchLabels"].update(a="b"),
        "PodDisruptionBudget gateway: selects no pod",
    ),
    "selector of a Service": (
        lambda d: find(d, "Service", "redis")["spec"]["selector"].update(a="b"),
        "Service redis: selects no pod",
    ),
    "selector of a policy": (
        lambda d: policy(d, "redis")["podSelector"]["matchLabels"].update({"llm-fusion/role": "radis"}),
        "NetworkPolicy redis: selects no pod",
    ),
    "image without a tag": (lambda d: container(d).update(image="llm-fusion"), "image llm-fusion is not pinned"),
    "image latest": (lambda d: container(d).update(image="llm-fusion:latest"), "llm-fusion:latest is not pinned"),
    "image of another version": (
        lambda d: container(d).update(image="registry.example.com/llm-fusion:9.9.9-cpu"),
        "is not of version",
    ),
    "root": (lambda d: head(d)["securityContext"].update(runAsUser=0), "must run as a user that is not root"),
    "seccomp": (lambda d: head(d)["securityContext"].pop("seccompProfile"), "seccompProfile must be RuntimeDefault"),
    "API token": (lambda d: head(d).update(automountServiceAccountToken=True), "automountServiceAccountToken must be"),
    "API token of an account": (
        lambda d: find(d, "ServiceAccount", "fusion").pop("automountServiceAccountToken"),
        "ServiceAccount fusion: automountServiceAccountToken",
    ),
    "privilege escalation": (
        lambda d: container(d)["securityContext"].pop("allowPrivilegeEscalation"),
        "allowPrivilegeEscalation must be false",
    ),
    "root file system": (
        lambda d: container(d)["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem must be true",
    ),
    "capabilities": (
        lambda d: container(d)["securityContext"]["capabilities"].update(add=["NET_RAW"]),
        "all capabilities must be dropped",
    ),
    "resources": (lambda d: container(d)["resources"].pop("limits"), "a limit for memory"),
    "probe": (lambda d: container(d).pop("livenessProbe"), "livenessProbe is missing"),
    "rights": (
        lambda d: d.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "Role",
                "metadata": {"name": "all"},
                "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}],
            }
        ),
        "Role all: nothing here needs rights",
    ),
    "Ray's version": (
        lambda d: ray_cluster(find(d, "RayJob", "distill")).update(rayVersion="2.9.0"),
        "rayVersion is 2.9.0",
    ),
    "Ray without authentication": (
        lambda d: ray_cluster(find(d, "RayJob", "distill")).pop("authOptions"),
        "authOptions.mode must be token",
    ),
    "long name": (
        lambda d: find(d, "RayService", "source-qwen3-8b")["metadata"].update(name="s" * 48),
        "at most 47 characters",
    ),
    "command of an init container": (
        lambda d: worker(d)["template"]["spec"]["initContainers"][0].update(
            args=["fusion", "k8s", "wait", "--file", "x"]
        ),
        "No such option",
    ),
    "entrypoint": (
        lambda d: find(d, "RayJob", "distill")["spec"].update(entrypoint="python train.py"),
        "is not the training job",
    ),
    "recipe of the entrypoint": (
        lambda d: find(d, "RayJob", "distill")["spec"].update(
            entrypoint="python -m services.distill --recipe /etc/fusion/recipe/other.yaml"
        ),
        "other.yaml is in no ConfigMap",
    ),
    "contents of the recipe": (
        lambda d: find(d, "ConfigMap", "fusion-recipe")["data"].update(
            {"recipe.yaml": find(d, "ConfigMap", "fusion-recipe")["data"]["recipe.yaml"] + "typo: 1\n"}
        ),
        "typo: unknown key",
    ),
    "messages of any size": (
        lambda d: container(d)["env"].remove({"name": "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", "value": "67108864"}),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE must be 67108864",
    ),
    "no default policy": (lambda d: remove(d, "NetworkPolicy", "default-deny"), "stray pod"),
    "an edge too many": (
        lambda d: policy(d, "source")["ingress"][0].pop("from"),
        "admitted, but not drawn: stranger -> source on 9000",
    ),
    "a port too many": (
        lambda d: policy(d, "dns")["egress"][0]["ports"].append({"protocol": "TCP", "port": 5353}),
        "admitted, but not drawn: distill -> DNS on 5353",
    ),
    "an edge too few": (
        lambda d: policy(d, "distill").update(egress=[]),
        "not admitted, but drawn: distill -> fusion on 9000",
    ),
    "another source's cluster": (
        lambda d: policy(d, "source-cluster-qwen3-8b").update(podSelector=ALL, **BOTH_WAYS),
        "admitted, but not drawn: source -> source on any",
    ),
    "own cluster shut": (
        lambda d: remove(d, "NetworkPolicy", "distill-cluster"),
        "distill -> distill head on only some ports of its own cluster",
    ),
}
