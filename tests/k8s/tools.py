"""Prometheus and promtool: from PATH, else out of Debian's package, unpacked without being installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from services.base.home import exclusive

_TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llm-fusion" / "tools"


def prometheus_program(name: str) -> Path:
    """Path of `prometheus` or `promtool`. Without it the test is skipped, or fails where REQUIRE_TOOLS is set."""
    if found := shutil.which(name):
        return Path(found)
    folder = _TOOLS / "prometheus"
    program = folder / "usr" / "bin" / name
    with exclusive(folder):
        if not program.is_file() and (problem := _unpack(folder)):
            assert not os.environ.get("REQUIRE_TOOLS"), f"{name} is needed where REQUIRE_TOOLS is set: {problem}"
            pytest.skip(f"{name} cannot be had, so alerts and metrics are NOT checked: {problem}")
    return program


def _unpack(folder: Path) -> str:
    """Downloads and unpacks the package; returns what went wrong."""
    working = folder.with_name("prometheus.making")
    shutil.rmtree(working, ignore_errors=True)
    (working / "lists" / "partial").mkdir(parents=True)
    (working / "cache" / "archives" / "partial").mkdir(parents=True)
    # Lists of its own: those of the machine may be missing, and only root may fetch them.
    apt = ["apt-get", "-o", f"Dir::State::lists={working}/lists", "-o", f"Dir::Cache={working}/cache"]
    apt += ["-o", "APT::Sandbox::User="]
    try:
        for command in ([*apt, "update"], [*apt, "download", "prometheus"]):
            subprocess.run(command, cwd=working, check=True, capture_output=True, text=True, timeout=300)
        [package] = working.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(working / "root")], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{error} {getattr(error, 'stderr', '') or ''}"[-500:]
    shutil.rmtree(folder, ignore_errors=True)
    (working / "root").rename(folder)
    shutil.rmtree(working)
    return ""
