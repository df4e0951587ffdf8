"""Programs that are run for their output: what comes back, within which bounds, and what is left behind."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import psutil
import pytest

from services.base.errors import FailedPreconditionError, UnavailableError
from services.verify.sandbox.sandbox import Sandbox
from tests.verify.sandbox.hacks import FOOLS_PLAIN_PYTHON, OTHERS
from tests.verify.sandbox.test_hacks import sandbox_of


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(seconds=60)


@pytest.mark.parametrize(
    ("program", "end", "output"),
    [
        ("print('a')\nimport sys\nprint('é👍', file=sys.stderr)\n6 * 7", "finished", "a\né👍\n42\n"),
        ("x = 1\nNone", "finished", ""),
        ("", "finished", ""),
        ("input()", "failed", "EOFError"),
        ("def f():\n    return 1 / 0\nf()", "failed", 'File "program", line 2, in f'),
        ("def f(:", "failed", "SyntaxError"),
        ("print('so')\nraise SystemExit(3)", "failed", "so\n"),
        ("import sys\nsys.exit('no such key')", "failed", "no such key\n"),
        ("import os, sys\nprint('gone')\nos._exit(0)", "finished", "gone\n"),
        ("held = bytearray(10**9)", "failed", "MemoryError"),
        ("import os\nos.fork()", "failed", "PermissionError"),
        ("import socket\nsocket.socket()", "failed", "PermissionError"),
        ("open('/tmp/a', 'w').write('1')\nopen('/a', 'w')", "failed", "OSError"),
        ("import os\nsorted(os.environ)", "finished", "['LC_CTYPE', 'LD_LIBRARY_PATH', 'PWD']"),
    ],
)
def test_outputs(sandbox: Sandbox, program: str, end: str, output: str) -> None:
    found = sandbox.run(program, 10_000).output()
    text = found.output.decode()
    assert found.end == end
    assert text == output if end == "finished" and "environ" not in program else output in text


def test_an_output_is_cut_at_the_bound(sandbox: Sandbox) -> None:
    start = time.monotonic()
    found = sandbox.run("while True: print('x' * 99)", 150).output()
    assert (found.end, found.output) == ("too_long", b"x" * 99 + b"\n" + b"x" * 50)
    assert sandbox.run("print('x' * 149)", 150).output().end == "finished"
    assert time.monotonic() - start < 50  # a program may take 60 s


def test_time_is_up_whatever_a_program_does_with_its_output() -> None:
    endless = "import os, time\nprint('begun')\nos.close(1)\nos.close(2)\nwhile True: time.sleep(1)"
    for program, seconds, output in ((endless, 5.5, b"begun\n"), ("while True: pass", 2.5, b"")):  # CPU: 6 s, 3 s
        found = sandbox_of(seconds=seconds).run(program, 100).output()
        assert (found.end, found.output) == ("late", output)


def test_a_run_that_is_cancelled_ends(sandbox: Sandbox) -> None:
    run = sandbox.run("while True: pass", 100)
    timer = threading.Timer(0.3, run.cancel)
    timer.start()
    start = time.monotonic()
    with suppress(UnavailableError):  # it may not have begun
        assert run.output().end == "failed"
    assert time.monotonic() - start < 50


def test_hacks_leave_nothing_behind(sandbox: Sandbox) -> None:
    before = set(psutil.Process().children(recursive=True))
    hacks = {**FOOLS_PLAIN_PYTHON, **OTHERS}
    for name in ("fork bomb", "killing everything", "closing all files", "full disk", "exit from a thread", "crash"):
        assert sandbox.run(hacks[name], 1000).output().end in {"finished", "failed"}
    assert set(psutil.Process().children(recursive=True)) - before == set()
    assert sandbox.run("1 + 1", 10).output().output == b"2\n"


def test_without_bubblewrap_nothing_is_run() -> None:
    with pytest.raises(FailedPreconditionError, match="program: programs need bubblewrap"):
        Sandbox("/nowhere/bwrap").run("1", 10)
