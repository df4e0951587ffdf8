"""This machine in the place of a Kubernetes cluster: runs what rendered manifests say, one Ray per RayService.

Taken over as they stand: arguments of Ray, Serve configs, entrypoint, commands of containers, probes, environment.
Exchanged, because one machine has one network and no volumes: addresses, ports and the folders under /data and
/etc/fusion. Head and worker of a service are one Ray node here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.deploy.local_ray import Deployment, free_port
from tests.k8s.check.manifests import Document, of_kind, ray_cluster

_BIN = Path(sys.executable).parent
_PORTS = (6379, 6380, 8265, 10001, 8080, 8000, 9000)
_RAY_PORTS = {"port": 6379, "dashboard-port": 8265, "ray-client-server-port": 10001}
"""Arguments that KubeRay leaves at Ray's defaults, and those."""


@dataclass
class Cluster:
    """One RayService's Ray, and the ports of this machine that stand for those of its pods."""

    document: Document
    ports: dict[int, int] = field(default_factory=lambda: {port: free_port() for port in _PORTS})
    process: subprocess.Popen[bytes] | None = None
    folder: str = ""

    @property
    def head(self) -> dict[str, Any]:
        container: dict[str, Any] = ray_cluster(self.document)["headGroupSpec"]["template"]["spec"]["containers"][0]
        return container

    @property
    def worker(self) -> dict[str, Any]:
        spec: dict[str, Any] = ray_cluster(self.document)["workerGroupSpecs"][0]["template"]["spec"]
        return spec

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports[8265]}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports[9000]}"


class Machine:
    """Folders and addresses of one run."""

    def __init__(self, documents: Sequence[Document], root: Path) -> None:
        self.documents, self.root = documents, root
        self.clusters = {d["metadata"]["name"]: Cluster(d) for d in of_kind(documents, "RayService")}
        (root / "etc" / "fusion" / "token").mkdir(parents=True)
        (root / "etc" / "fusion" / "token" / "token").write_text("a-token\n")
        (root / "etc" / "fusion" / "recipe").mkdir()
        [recipe] = [d for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] == "fusion-recipe"]
        (root / "etc" / "fusion" / "recipe" / "recipe.yaml").write_text(self.here(recipe["data"]["recipe.yaml"]))

    def here(self, text: str) -> str:
        """Text of a manifest with this machine's addresses and folders."""
        text = re.sub(r"(?<![\w/])(/data|/etc/fusion)(?=/|\b)", rf"{self.root}\1", text)
        for cluster in self.clusters.values():
            service = cluster.document["spec"]["serveService"]["metadata"]["name"]
            text = re.sub(rf"(?<![\w-]){re.escape(service)}:9000", cluster.grpc_address, text)
        return text

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """The container's own variables over this process'; there are no Secrets here, so optional ones are unset."""
        entries = container.get("env", [])
        assert all("value" in entry or entry["valueFrom"]["secretKeyRef"]["optional"] for entry in entries), entries
        own = {entry["name"]: self.here(entry["value"]) for entry in entries if "value" in entry}
        path = f"{_BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "RAY_metrics_report_interval_ms": "1000", **own}

    def run(self, container: dict[str, Any], *, timeout_seconds: float = 120) -> str:
        """Runs a container's command to its end; the output."""
        words = [self.here(word) for word in (*container.get("command", []), *container.get("args", []))]
        done = subprocess.run(
            words, env=self.environment(container), capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, cluster: Cluster, *, num_cpus: int) -> None:
        """Starts Ray as KubeRay would the head, with the room of its workers."""
        spec = ray_cluster(cluster.document)
        parameters = {**spec["workerGroupSpecs"][0]["rayStartParams"], **spec["headGroupSpec"]["rayStartParams"]}
        for name, value in parameters.items():
            if value.isdigit() and int(value) in cluster.ports:
                parameters[name] = str(cluster.ports[int(value)])
        parameters |= {name: str(cluster.ports[port]) for name, port in _RAY_PORTS.items()}
        parameters |= {"num-cpus": str(num_cpus), "node-ip-address": "127.0.0.1", "dashboard-host": "127.0.0.1"}
        # As in a pod, a folder of its own: jobs look there for the newest cluster. Short, for the sockets in it.
        cluster.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        parameters |= {"dashboard-agent-listen-port": str(free_port()), "temp-dir": cluster.folder}
        flags = [
            f"--{name}" if value == "true" else f"--{name}={value}"  # as KubeRay writes them
            for name, value in parameters.items()
        ]
        name = cluster.document["metadata"]["name"]
        with (self.root / f"{name}.log").open("wb") as log:
            cluster.process = subprocess.Popen(
                [str(_BIN / "ray"), "start", "--head", "--block", *flags],
                env=self.environment(cluster.head), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def serve_config(self, cluster: Cluster) -> dict[str, Any]:
        """The Serve config for this machine: nothing but ports, interface and addresses differ."""
        config: dict[str, Any] = yaml.safe_load(self.here(cluster.document["spec"]["serveConfigV2"]))
        config["http_options"] = {"host": "127.0.0.1", "port": cluster.ports[config["http_options"]["port"]]}
        config["grpc_options"]["port"] = cluster.ports[config["grpc_options"]["port"]]
        return config

    def stop(self) -> None:
        """Ends every Ray that still runs."""
        for name, cluster in self.clusters.items():
            if cluster.process is not None and cluster.process.poll() is None:
                pid = cluster.process.pid
                created = psutil.Process(pid).create_time()
                Deployment(name, "", pid, created, "", cluster.dashboard, cluster.grpc_address, "", "").stop()
            if cluster.folder:
                shutil.rmtree(cluster.folder, ignore_errors=True)


def probe(cluster: Cluster, container: dict[str, Any], kind: str) -> str:
    """What the kubelet does for a `grpc` probe: a bare health check."""
    settings = container[kind]["grpc"]
    with grpc.insecure_channel(f"127.0.0.1:{cluster.ports[settings['port']]}") as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=settings.get("service", ""))
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=container[kind]["timeoutSeconds"])
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def wait_for_probe(cluster: Cluster, container: dict[str, Any], kind: str) -> None:
    """Probes as often as the manifest allows, but faster."""
    deadline = time.monotonic() + container[kind]["periodSeconds"] * container[kind]["failureThreshold"]
    while (state := probe(cluster, container, kind)) != "SERVING":
        assert time.monotonic() < deadline, f"{container['name']}: {kind} says {state}"
        assert cluster.process is None or cluster.process.poll() is None, f"{container['name']}: Ray has ended"
        time.sleep(0.2)
