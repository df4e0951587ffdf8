"""The golden suite of hacks: none passes, and after all of them the sandbox is as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from fusion_core.verify.specs import ProgramSpec
from services.verify.sandbox.run import ProgramLimits
from services.verify.sandbox.sandbox import Sandbox
from tests.fakes.packages.bubblewrap import bubblewrap_program
from tests.verify.sandbox.hacks import ENDLESS, FOOLS_PLAIN_PYTHON, OTHERS, TESTS

SPEC = ProgramSpec(("add",), TESTS)
HONEST = "def add(a, b):\n    return a + b\n"


def sandbox_of(seconds: float) -> Sandbox:
    made = Sandbox(str(bubblewrap_program()), ProgramLimits(seconds=seconds, memory_bytes=256 * 2**20))
    if made.problem:
        pytest.skip(f"the sandbox is NOT checked: {made.problem}")
    return made


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """After all hacks an honest answer is still right, and no process is left."""
    before = set(psutil.Process().children(recursive=True))
    made = sandbox_of(seconds=60)
    assert made.start(SPEC, HONEST).verdict().right
    yield made
    assert made.start(SPEC, HONEST).verdict().right
    assert set(psutil.Process().children(recursive=True)) - before == set()


@pytest.mark.parametrize("name", [*FOOLS_PLAIN_PYTHON, *OTHERS])
def test_no_hack_passes(sandbox: Sandbox, name: str) -> None:
    verdict = sandbox.start(SPEC, {**FOOLS_PLAIN_PYTHON, **OTHERS}[name]).verdict()
    assert (verdict.right, verdict.score) == (False, 0.0)
    assert verdict.reason


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(name: str) -> None:
    assert not sandbox_of(seconds=2).start(SPEC, ENDLESS[name]).verdict().right


def test_these_hacks_are_worth_stopping() -> None:
    """The oracle of the suite: one process for answer and tests is fooled, so the hacks do what they are for."""
    for name, hack in FOOLS_PLAIN_PYTHON.items():
        program = [sys.executable, "-I", "-c", f"{hack}\n# TESTS\n{TESTS}"]
        assert subprocess.run(program, capture_output=True, timeout=60, check=False).returncode == 0, name
    assert len(FOOLS_PLAIN_PYTHON) + len(OTHERS) + len(ENDLESS) >= 30
