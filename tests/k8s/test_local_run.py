"""The rendered manifests, run on this machine: prepare, deploy, probe, stream, distil, measure, drain, stop."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner

from services.base.errors import ServiceError, UnauthenticatedError
from services.cli.app import app
from services.deploy.local_ray import enable_ray_authentication, free_port
from services.deploy.up import deploy
from services.fusion.client import FusionClient, StreamRequest
from services.rpc.auth import read_token
from tests.fakes.tiny_model import make_tiny_model, sentences
from tests.k8s.check.manifests import REPOSITORY, kustomize, of_kind, ray_cluster
from tests.k8s.check.monitoring import queries, selectors
from tests.k8s.conftest import Build
from tests.k8s.machine import Machine, probe, wait_for_probe
from tests.k8s.metric_names import OF_SCRAPING
from tests.k8s.tools import prometheus_program

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]

ONLY_WHEN_SOMETHING_IS_WRONG = {
    "ray_llm_fusion_source_errors_total",
    "ray_llm_fusion_fusion_masked_tokens_total",
    "ray_llm_fusion_fusion_source_missing_total",
    "ray_llm_fusion_fusion_source_retries_total",
    "ray_llm_fusion_fusion_source_timeouts_total",
    "ray_llm_fusion_fusion_degraded_total",
    "ray_llm_fusion_fusion_skipped_total",
}
"""Ray exports a counter from its first increment on."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.3)
    return value


RECIPE = {
    "name": "local",
    "corpus": {
        "name": "sentences",
        "files": ["/data/runs/text/*.txt"],
        "window_bytes": 256,
        "context_bytes": 0,
        "held_out_share": 0.2,
        "shared_run_bytes": None,
    },
    "sources": [
        {"name": "made-up", "model": "/data/models/tiny", "engine": "transformers", "top_k": 8, "torch_threads": 1}
    ],
    "target": {
        "config": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
        "tokenizer": {"train": {"vocabulary_size": 400}},
    },
    "fusion": {"k_out": 8},
    "service": {"source_attempts": 1},
    "distill": {
        "lambda": 0.5,
        "epochs": 6,
        "batch_windows": 8,
        "device": "cpu",
        "torch_threads": 1,
        "checkpoint_every_steps": 50,
    },
}


@pytest.fixture(scope="module")
def machine(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    del build  # kubectl is there
    enable_ray_authentication()
    root = tmp_path_factory.mktemp("machine")
    k8s = shutil.copytree(REPOSITORY / "k8s", root / "k8s")
    file = root / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    overlay = k8s / "overlays" / "local"
    done = CliRunner().invoke(app, ["k8s", "render", str(file), "--base", str(k8s), "--output", str(overlay)])
    assert done.exit_code == 0, done.output
    make_tiny_model(root / "data" / "models" / "tiny", vocabulary_size=500, seed=1)
    texts = root / "data" / "runs" / "text"
    texts.mkdir(parents=True)
    for number in range(24):
        (texts / f"{number:02}.txt").write_text(sentences(500, seed=number), encoding="utf-8")
    machine = Machine(kustomize(overlay), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_TOKEN_FILE", str(root / "etc" / "fusion" / "token" / "token"))
        try:
            yield machine
        finally:
            machine.stop()


def test_the_manifests_run_from_preparation_to_the_end(machine: Machine, tmp_path: Path) -> None:
    source, fusion = machine.clusters["source-made-up"], machine.clusters["fusion"]
    machine.start(source, num_cpus=1)
    wait_for_probe(source, source.head, "startupProbe")  # two at once may take Ray longer than the 30 s that it waits
    machine.start(fusion, num_cpus=3)  # the fusion service's pod and the job's
    [prepare] = of_kind(machine.documents, "Job")
    assert "recipe.yaml" in machine.run(prepare["spec"]["template"]["spec"]["containers"][0])

    for cluster in (source, fusion):
        for container in (cluster.head, cluster.worker["containers"][0]):
            wait_for_probe(cluster, container, "startupProbe")
            assert probe(cluster, container, "livenessProbe") == "SERVING"
        assert probe(cluster, cluster.head, "readinessProbe") == "SERVING"
        worker = cluster.worker["containers"][0]
        assert probe(cluster, worker, "readinessProbe") != "SERVING"  # nothing is served yet
        machine.run(cluster.worker["initContainers"][0])
        deploy(machine.serve_config(cluster), cluster.dashboard, lambda states: None, timeout_seconds=180)
        wait_for_probe(cluster, {**worker, "readinessProbe": {**worker["readinessProbe"], "failureThreshold": 6}},
                       "readinessProbe")  # fmt: skip

    client = FusionClient(fusion.grpc_address, token=read_token())
    [block] = client.fuse([b"The capital of France is"])
    assert [share.name for share in block.shares] == ["made-up"]
    with pytest.raises(UnauthenticatedError):
        FusionClient(fusion.grpc_address, token="wrong").fuse([b"x"])
    first = next(iter(client.stream(StreamRequest(dataset="sentences", split="train", seed=0))))
    assert first.block.num_tokens > 0

    prometheus = Prometheus(tmp_path, [cluster.ports[8080] for cluster in (source, fusion)])
    try:
        distil(machine)
        drain_and_stop(machine)
        with pytest.raises(ServiceError):
            client.fuse([b"Nobody answers this."])
        wait_until(lambda: probe(fusion, fusion.worker["containers"][0], "readinessProbe") != "SERVING", "NOT_SERVING")
        wait_until(lambda: prometheus.value("ray_llm_fusion_fusion_quorum_lost_total") >= 1, "the refused text")
        wait_until(lambda: prometheus.value("ray_llm_fusion_fusion_source_serving") == 0, "the lost source")
        check_metrics(prometheus)
    finally:
        prometheus.stop()


def distil(machine: Machine) -> None:
    """The RayJob: its init container, then its entrypoint on a Ray cluster, as KubeRay's submitter does it."""
    fusion = machine.clusters["fusion"]
    [job] = of_kind(machine.documents, "RayJob")
    head = ray_cluster(job)["headGroupSpec"]["template"]["spec"]
    machine.run(head["initContainers"][0])
    jobs = JobSubmissionClient(fusion.dashboard)
    own = {entry["name"]: machine.here(entry["value"]) for entry in head["containers"][0]["env"]}
    identity = jobs.submit_job(entrypoint=machine.here(job["spec"]["entrypoint"]), runtime_env={"env_vars": own})
    wait_until(lambda: jobs.get_job_status(identity).is_terminal(), "the training job", 240)
    assert jobs.get_job_status(identity) == JobStatus.SUCCEEDED, jobs.get_job_logs(identity)
    model = machine.root / "data" / "runs" / "local" / "fused" / "model"
    assert (model / "config.json").is_file()


def drain_and_stop(machine: Machine) -> None:
    """What the kubelet does with a pod of the source: preStop, then SIGTERM within the grace period."""
    source = machine.clusters["source-made-up"]
    worker = source.worker["containers"][0]
    command = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert command[-1].rstrip().endswith("sleep 30")
    quicker = {"command": [*command[:-1], command[-1].replace("sleep 30", "sleep 1")]}
    environment = [*worker["env"], {"name": "RAY_ADDRESS", "value": f"127.0.0.1:{source.ports[6379]}"}]
    said = machine.run({**quicker, "env": environment})
    assert "rror" not in said, said
    assert source.process is not None
    family = psutil.Process(source.process.pid).children(recursive=True)
    source.process.terminate()
    source.process.wait(timeout=source.worker["terminationGracePeriodSeconds"])
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, alive


class Prometheus:
    """A real Prometheus that scrapes the given ports every second."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self._url = f"http://127.0.0.1:{(port := free_port())}"
        targets = [f"127.0.0.1:{target}" for target in ports]
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        program = str(prometheus_program("prometheus"))
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._process = subprocess.Popen(
            [program, *flags, f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=(folder / "prometheus.log").open("wb"),
        )  # fmt: skip
        wait_until(lambda: self._up() == len(ports), "Prometheus to scrape both", 60)

    def _up(self) -> float:
        try:
            return self.value("sum(up)")
        except OSError:
            return 0.0

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def value(self, query: str) -> float:
        """Of the first series; -1 for none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else -1.0

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)


def check_metrics(prometheus: Prometheus) -> None:
    """Every metric that a dashboard or an alert names is there with the labels used, but those that tell of trouble."""
    problems = []
    for where, query in queries():
        for name, labels in selectors(query):
            series = prometheus.ask("series", **{"match[]": name, "start": str(time.time() - 600)})
            if not series and name not in ONLY_WHEN_SOMETHING_IS_WRONG:
                problems.append(f"{where}: Prometheus knows no {name}")
            if series and not labels - OF_SCRAPING <= series[0].keys():
                problems.append(f"{where}: {name} has only {sorted(series[0])}")
    assert problems == []
