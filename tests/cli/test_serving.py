"""`fusion up`, `status`, `fetch` and `doctor`: what they refuse, and what they show."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.deploy.local_ray import free_port
from tests.cli.conftest import Fusion, Written
from tests.fakes.files.small_disk import small_disk
from tests.fakes.live import Live

pytestmark = pytest.mark.timeout(900)


def own_ports(*kinds: str) -> list[str]:
    """Options that take ports of the recipe from what may be up with the recipe's own."""
    return [word for kind in kinds for word in ("--set", f"service.{kind}_port={free_port()}")]


def test_port_in_use_is_named(fusion: Fusion, written: Written) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fusion(
            "up", written("service.grpc_port", port), "--set", "name=another", *own_ports("http", "dashboard")
        )
    assert done.returncode == 2
    assert f"service.grpc_port: port {port} is in use" in done.stderr


def test_full_disk_is_named(fusion: Fusion, written: Written, tmp_path: Path) -> None:
    """A file system of 64 KiB that is full: preparing must say so, not leave half a corpus behind."""
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 60 * 1024)
        recipe = written("output_dir", str(disk))
        done = fusion("up", recipe, "--set", "name=full", *own_ports("grpc", "http", "dashboard"))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "No space left on device" in done.stderr or "no space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(disk.glob("full/corpus/corpus.json"))


def test_a_service_that_is_not_there_is_named(fusion: Fusion) -> None:
    done = fusion("fetch", "--text", "x", "--address", "127.0.0.1:9")
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_fetch_and_second_up(fusion: Fusion, live: Live) -> None:
    status = fusion("status")
    assert status.returncode == 0, status.stdout + status.stderr
    for word in ("SERVING", "smollm2", "tiny", live.client.info().vocabulary):
        assert word in status.stdout
    fetched = fusion("fetch", "--text", "The capital of France is", "--top", "3")
    assert fetched.returncode == 0, fetched.stderr
    assert "(next)" in fetched.stdout
    assert "source smollm2: weight" in fetched.stdout
    again = fusion("up", str(live.recipe_file))
    assert (again.returncode, "is up already" in again.stderr) == (2, True)


def test_doctor_and_help(fusion: Fusion) -> None:
    assert "vLLM" in fusion("doctor").stdout
    shown = fusion("--help").stdout
    for command in (
        "models",
        "validate",
        "up",
        "down",
        "status",
        "fetch",
        "backfill",
        "distill",
        "eval",
        "report",
        "doctor",
    ):
        assert command in shown
