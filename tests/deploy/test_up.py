"""Two `fusion up` in the same moment: one starts, the other is refused and deploys nothing onto its cluster. And a head
that dies while they wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from services.base.errors import UnavailableError
from services.deploy.local_ray import Deployment, deployments, free_port
from services.deploy.up import deploy
from tests.fakes.tiny_model import make_tiny_model, sentences

FUSION = str(Path(sys.executable).parent / "fusion")


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_of_two_that_start_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("FUSION_HOME", str(home))
    model = make_tiny_model(tmp_path / "tiny", vocabulary_size=300, seed=1)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(sentences(300, seed=number))
    recipe = {
        "output_dir": str(tmp_path / "runs"),
        "corpus": {"files": [f"{tmp_path}/*.txt"], "window_bytes": 128, "shared_run_bytes": None},
        "sources": [{"name": "s", "model": str(model), "engine": "synthetic", "max_tokens": 255}],
        "target": {"model": str(model)},
        "service": {"grpc_port": free_port(), "http_port": free_port(), "dashboard_port": free_port()},
    }
    starting = []
    for name in ("first", "second"):  # two recipes on the same ports
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **recipe}))
        command = [FUSION, "up", str(tmp_path / f"{name}.yaml"), "--no-sources"]
        starting.append(
            subprocess.Popen(command, env={**os.environ, "COLUMNS": "300"}, stderr=subprocess.PIPE, text=True)
        )
    try:
        said = [process.communicate(timeout=500)[1] for process in starting]
        codes = [process.returncode for process in starting]
        assert sorted(codes) == [0, 2], said
        [running] = deployments()
        assert running.name == ("first", "second")[codes.index(0)]
        assert f"is that of {running.name}, which is up" in said[codes.index(2)]
    finally:
        for deployment in deployments():
            deployment.stop()


HEAD = """
import subprocess, sys
left = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(left.pid, "x" * 9000, flush=True)
sys.stdin.read()
print("raylet: out of memory")
"""


@pytest.mark.timeout(60)
def test_a_head_that_ends_ends_the_wait_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is a child that nobody has asked how it ended, as Ray's head is one of `fusion up`."""
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    log = tmp_path / "ray.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-c", HEAD]
        head = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, text=True, start_new_session=True)
    dashboard = f"http://127.0.0.1:{free_port()}"
    created = psutil.Process(head.pid).create_time()
    deployment = Deployment("run", "", head.pid, created, "", dashboard, "", "fusion", str(log))
    looks = []

    def check_head() -> None:
        looks.append(deployment.running)
        if len(looks) > 1 and log.stat().st_size:  # the dashboard has not answered once
            assert head.stdin is not None
            head.stdin.close()
        deployment.check_running()

    expected = rf"(?s)process {head.pid}, has ended; the end of {log} reads:\n(?!x{{2000}}).*raylet: out of memory"
    with pytest.raises(UnavailableError, match=expected):
        deploy({"applications": []}, dashboard, lambda states: None, timeout_seconds=900, check_head=check_head)
    assert looks[:2] == [True, True] and not deployment.running
    left_behind = psutil.Process(int(log.read_text().split()[0]))
    assert left_behind.is_running()
    deployment.stop()
    assert not left_behind.is_running() or left_behind.status() == psutil.STATUS_ZOMBIE
    head.wait()
