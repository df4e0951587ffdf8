"""The wheel ships with the generated stubs inside, and parts import of each other only what they may."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
PARTS = ("source", "fusion", "recall", "reward", "verify", "distill")
ALLOWED = tuple(f"services.{part}.client" for part in ("fusion", "recall", "source", "reward", "verify"))
"""The only doors between the parts: clients, which speak gRPC."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as anyone builds it, from a copy of the sources without anything generated."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("protos", "fusion_core", "services"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_stubs_and_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for proto in ("block", "source", "fusion", "recall", "reward", "verify"):
        assert {f"fusion/v1/{proto}_pb2.py", f"fusion/v1/{proto}_pb2.pyi", f"fusion/v1/{proto}_pb2_grpc.py"} <= names
    assert {"fusion_core/py.typed", "services/py.typed"} <= names
    tracked = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "services" / "recipes").glob("*.yaml")}
    assert tracked <= names
    assert not [name for name in names if name.startswith(("tests/", "build/", "protos/"))]


def test_an_installed_wheel_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", f"--target={tmp_path}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    code = """
import sys
from pathlib import Path
import fusion.v1.fusion_pb2_grpc, fusion.v1.source_pb2_grpc, fusion_core.blocks, services.base.settings
from fusion.v1 import block_pb2
for module in (fusion.v1, fusion_core, services):
    assert Path(module.__path__[0]).is_relative_to(sys.argv[1]), module
print(block_pb2.TokenBlock(num_tokens=3).SerializeToString().hex())
"""
    # -P and the path in front: the installed copy is imported, not the working tree
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{code}", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1803"


def test_the_library_is_free_of_services() -> None:
    code = """
import importlib, pkgutil, sys, fusion_core
for module in pkgutil.walk_packages(fusion_core.__path__, "fusion_core."):
    importlib.import_module(module.name)
print(" ".join(sorted({name.split(".")[0] for name in sys.modules} & {"ray", "grpc", "services", "fusion", "vllm"})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, at whatever depth; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_of_services_speak_grpc_only(part: str) -> None:
    others = tuple(f"services.{other}." for other in PARTS if other != part)
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sorted((REPOSITORY / "services" / part).rglob("*.py"))
        for name in imported_modules(path)
        if f"{name}.".startswith(others) and not f"{name}.".startswith(tuple(f"{door}." for door in ALLOWED))
    ]
    assert wrong == []


def test_the_library_imports_no_service_in_any_branch() -> None:
    banned = ("ray", "grpc", "services", "fusion", "vllm")
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in sorted((REPOSITORY / "fusion_core").rglob("*.py"))
        for name in imported_modules(path)
        if name.split(".")[0] in banned
    ]
    assert wrong == []


def test_the_lock_fits_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for file, extra in (("cpu.txt", "cpu"), ("gpu.txt", "gpu")):
        lines = (REPOSITORY / "requirements" / file).read_text().splitlines()
        pinned = {line.split("==")[0].lower(): line.split("==")[1].split(" ")[0] for line in lines}
        for wanted in [*project["dependencies"], *extras[extra], *extras["dev"]]:
            requirement = Requirement(wanted)
            name = requirement.name.lower().replace("_", "-")
            assert name in pinned, f"{file} has no {name}: run `make lock`"
            assert requirement.specifier.contains(pinned[name], prereleases=True), f"{file}: {name} {pinned[name]}"
        assert not [line for line in lines if "://" in line or line.startswith("-")], "no hosts, no options"
    assert not {"torchvision", "torchaudio", "torchcodec"} & {
        line.split("==")[0] for line in (REPOSITORY / "requirements" / "cpu.txt").read_text().splitlines()
    }
