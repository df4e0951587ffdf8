"""The shape of the house: imports only look down, rooms stay small, functions fit a screen."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("services", "fusion_core", "tests")
MOST_MODULES, LONGEST_MODULE, LONGEST_FUNCTION = 14, 300, 70


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("services/base/errors.py", "import services.rpc.auth", "Rooms: imports only look down this list"),
        ("services/store/rows.py", "from services.commands import prepare", "Rooms: imports only look down this list"),
        ("fusion_core/blocks.py", "import services.base.errors", "fusion_core is pure"),
        ("fusion_core/blocks.py", "import ray", "fusion_core is pure"),
        ("services/fusion/fuser.py", "import services.source.scorer", "Services speak gRPC: of a source"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, module: str, forbidden: str, contract: str) -> None:
    for package in ("services", "fusion_core"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n\n{forbidden}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert [line for line in broken if line.startswith(contract)], done.stdout
    assert module.removesuffix(".py").replace("/", ".") in done.stdout


def modules() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((REPOSITORY / room).rglob("*.py"))


def is_data(tree: ast.Module) -> bool:
    """Whether a module only names values: no function, no class."""
    return not any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(tree))


def test_no_folder_has_more_modules_than_one_look_takes_in() -> None:
    folders: dict[Path, int] = {}
    for path in modules():
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    full = {str(folder.relative_to(REPOSITORY)): n for folder, n in folders.items() if n > MOST_MODULES}
    assert not full, full


def test_no_module_is_longer_than_a_sitting_and_no_function_than_a_screen() -> None:
    long = {}
    for path in modules():
        text = path.read_text()
        tree, name = ast.parse(text), str(path.relative_to(REPOSITORY))
        if (lines := text.count("\n")) > LONGEST_MODULE and not is_data(tree):
            long[name] = lines
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long[f"{name}: {node.name}"] = lines
    assert not long, long
