"""Machine code on disk: used again while nothing that it was compiled from has changed, and never longer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusion_core

CALLEE = '''
from fusion_core.compiled import compiled
from fusion_core.limits import LIMIT

@compiled
def limited(value):
    """Doc."""
    return min(value, LIMIT) + 1  # a comment
'''
CALLER = """
from fusion_core.callee import limited
from fusion_core.compiled import compiled

@compiled
def total(n):
    sum_ = 0
    for i in range(n):
        sum_ += limited(i)
    return sum_
"""
RUN = """
from fusion_core.caller import total
print(total(5), sum(total.stats.cache_hits.values()))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that calls itself fusion_core and has the real `compiled`."""
    folder = tmp_path / "fusion_core"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(Path(fusion_core.__file__).parent / "compiled.py", folder)
    (folder / "limits.py").write_text("LIMIT = 3\n")
    (folder / "callee.py").write_text(CALLEE)
    (folder / "caller.py").write_text(CALLER)
    return folder


def run(package: Path, **env: str) -> tuple[int, int]:
    """The result of the kernel, and how often its machine code was found on disk."""
    inherited = {key: value for key, value in os.environ.items() if key not in {"NUMBA_CACHE_DIR", "PYTHONPATH"}}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=package.parent, env=inherited | env, capture_output=True, text=True, check=True
    )
    result, hits = map(int, done.stdout.split())
    return result, hits


def change(file: Path, old: str, new: str) -> None:
    """Change a file so that neither its size nor its time tells."""
    before = file.stat()
    assert len(old) == len(new)
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("folder", ["beside", "given"])
def test_a_change_in_a_callee_or_a_constant_is_compiled(package: Path, folder: str) -> None:
    env = {"NUMBA_CACHE_DIR": str(package.parent / "machine-code")} if folder == "given" else {}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    assert run(package, **env) == (14, 0)
    assert run(package, **env) == (14, 1)
    change(package / "callee.py", "+ 1", "+ 2")
    assert run(package, **env) == (19, 0)
    change(package / "limits.py", "3", "1")
    assert run(package, **env) == (14, 0)


def test_comments_and_docstrings_cost_nothing(package: Path) -> None:
    assert run(package) == (14, 0)
    file = package / "callee.py"
    file.write_text(file.read_text().replace("# a comment", "# another, and a longer one").replace("Doc.", "Other."))
    assert run(package) == (14, 1)


def test_without_a_place_for_machine_code_everything_is_compiled_in_the_process(package: Path) -> None:
    (package / "__pycache__").write_text("no folder")
    home = package.parent / "home"
    home.write_text("no folder either")
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    assert run(package, **env) == (14, 0)
    assert run(package, **env) == (14, 0)
