"""Commands against what is up: recorded deployments of this process stand for services, nothing is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.deploy.local_ray import Deployment, free_port
from services.recipes.load import load_recipe

Up = Callable[..., Path]


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Up]:
    """Records the recipe `a` as up on ports of its own, by this process; returns its file."""
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    ports = {"grpc_port": free_port(), "http_port": free_port(), "dashboard_port": free_port()}
    source: dict[str, Any] = {"name": "s", "model": str(tmp_path), "engine": "transformers"}
    recipe = {
        "name": "a",
        "output_dir": str(tmp_path / "runs"),
        "corpus": {"files": [f"{tmp_path}/*.txt"]},
        "sources": [source, {**source, "name": "t"}],
        "target": {"model": str(tmp_path)},
        "service": ports,
    }
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))

    def record(**service: int) -> Path:
        loaded = load_recipe(tmp_path / "a.yaml", {f"service.{key}": value for key, value in service.items()})
        loaded.save(loaded.run_folder / "recipe.yaml")
        Deployment(
            name="a",
            recipe=str(loaded.run_folder / "recipe.yaml"),
            pid=os.getpid(),
            pid_created=psutil.Process().create_time(),
            gcs_address="127.0.0.1:1",
            dashboard="http://127.0.0.1:9",
            grpc_address="127.0.0.1:9",
            application="fusion",
            log="",
            ports=tuple({**ports, **service}.values()),
        ).save()
        return tmp_path / "a.yaml"

    yield record


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), terminal_width=300)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("service.below_quorum=skip", "service.below_quorum"),
        ("service.store=elsewhere", "service.store"),
        ("service.per_client.blocks=4096", "service.per_client.blocks"),
        ("fusion.tau=0.5", "fusion.tau"),
        ("fusion.alignment={method: byte, follow_tokens: 0}", "fusion.alignment.follow_tokens"),
        ("sources.1.top_k=7", "sources.1.top_k"),
        ("sources.0.eos_token=x", "sources.0.eos_token"),
        ("corpus.window_bytes=512", "corpus.window_bytes"),
        ("target.model=/elsewhere", "target.model"),
    ],
)
def test_a_setting_that_the_running_services_decide_is_refused_by_its_key(up: Up, setting: str, key: str) -> None:
    done = run("distill", str(up()), "--set", setting)
    assert (done.exit_code, f"{key}: differs from what is up" in done.stderr) == (2, True), done.output


@pytest.mark.parametrize("setting", ["distill.learning_rate=0.5", "corpus.workers=3"])
def test_settings_that_decide_no_window_are_free(up: Up, setting: str) -> None:
    done = run("distill", str(up()), "--set", setting)
    assert "differs" not in done.output


def test_a_second_up_is_refused_and_leaves_the_record_of_the_first(up: Up) -> None:
    recipe = up()
    kept = load_recipe(recipe).run_folder / "recipe.yaml"
    before = kept.read_text()
    done = run("up", str(recipe), "--set", "fusion.tau=0.5")
    assert (done.exit_code, "a is up already" in done.stderr) == (2, True), done.output
    assert kept.read_text() == before


@pytest.mark.parametrize("key", ["grpc_port", "http_port", "dashboard_port"])
def test_a_port_of_another_deployment_is_taken_before_it_listens(up: Up, key: str) -> None:
    recipe = up()
    wanted = {name: free_port() for name in ("grpc_port", "http_port", "dashboard_port")}
    wanted[key] = load_recipe(recipe).service.grpc_port
    settings = [word for name, port in wanted.items() for word in ("--set", f"service.{name}={port}")]
    done = run("up", str(recipe), "--set", "name=b", *settings)
    assert (done.exit_code, f"service.{key}: port {wanted[key]} is that of a" in done.stderr) == (2, True), done.output


@pytest.mark.parametrize(("http_port", "finding"), [(28000, "8000 in use"), (8000, "8000 in use by `fusion up`")])
def test_the_doctor_compares_ports_and_not_digits(up: Up, http_port: int, finding: str) -> None:
    up(http_port=http_port)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # somebody else listens there, which will do as well
            listener.bind(("127.0.0.1", 8000))
            listener.listen()
        [line] = [line for line in run("doctor").stdout.splitlines() if "HTTP port" in line]
    assert line.split("│")[2].strip() == finding
