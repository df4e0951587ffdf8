"""What programs may do in the sandbox, what they may not, and what happens where the sandbox does not work."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fusion_core.verify.specs import ProgramSpec
from services.base.errors import FailedPreconditionError, UnavailableError
from services.verify.sandbox.run import ProgramLimits
from services.verify.sandbox.sandbox import Sandbox
from tests.fakes.packages.bubblewrap import bubblewrap_program
from tests.verify.sandbox.test_hacks import HONEST, SPEC, sandbox_of


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(seconds=60)


def is_right(sandbox: Sandbox, answer: str, tests: str, *functions: str, prompt: str = "") -> bool:
    verdict = sandbox.start(ProgramSpec(functions or ("f",), tests, prompt), answer).verdict()
    assert bool(verdict.reason) != verdict.right
    return verdict.right


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        (
            "def f(x, *, more=None):\n    return x if more is None else [x, more]",
            "import math\n"
            "for x in (None, True, -7, 10**40, 0.1, math.inf, 'é\\ud800', '', b'\\0', [1, [2]], (1, ()), {1, 2},\n"
            "          frozenset('a'), {'a': {1: (2,)}}, 2 - 3j):\n"
            "    assert f(x) == x and type(f(x)) is type(x), x\n"
            "assert math.isnan(f(math.nan)) and str(f(-0.0)) == '-0.0'\n"
            "assert f(1, more={'b': 2}) == [1, {'b': 2}]",
        ),
        (
            "from collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\n"
            "def f(x):\n    return P(Counter(x), 1)",
            "assert f('aab') == ({'a': 2, 'b': 1}, 1)",
        ),
        (
            "def f(x):\n    if x < 0:\n        raise ValueError(f'{x} is negative')\n    return 1 // x",
            "assert f(1) == 1\n"
            "for bad, kind in ((-1, ValueError), (0, ZeroDivisionError)):\n"
            "    try:\n        f(bad)\n    except kind as error:\n        assert str(error)\n"
            "    else:\n        assert False",
        ),
        (
            "import sys\nprint('hello')\nprint('more', file=sys.stderr)\nseen = sys.stdin.read()\n"
            "def f():\n    print('x' * 10**6)\n    return seen",
            "assert f() == ''",
        ),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
            "def f(x):\n    return A(x).x",
            "assert f(2) == 2",
        ),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f():\n    return 1", "assert f() == 1"),
        ("```python\ndef f():\n    return 1\n```", "def check(g):\n    assert g() == 1\ncheck(f)"),
        ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f(), f(), f()] == [1, 2, 3]"),
        ("class F:\n    pass\nf = lambda x: sorted(x)", "assert f([2, 1]) == [1, 2]"),
    ],
)
def test_an_honest_answer_is_right(sandbox: Sandbox, answer: str, tests: str) -> None:
    assert is_right(sandbox, answer, tests)


def test_tests_use_what_the_prompt_defines_and_call_several_functions(sandbox: Sandbox) -> None:
    prompt = "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n"
    assert is_right(sandbox, "    return x / 2\n", "assert half(double(3)) == 3", "half", prompt=prompt)
    assert not is_right(sandbox, "    return x\n", "assert half(double(3)) == 3", "half", prompt=prompt)
    answer = "def enc(x):\n    return x + 1\ndef dec(x):\n    return x - 1"
    assert is_right(sandbox, answer, "assert dec(enc(4)) == 4", "enc", "dec")
    # what the answer defines beside the functions reaches no test
    assert not is_right(sandbox, "def f(x):\n    return 1\ndef abs(x):\n    return 0", "assert abs(f(1) - 9) == 0")


@pytest.mark.parametrize(
    "tests",
    [
        "import sys\nf()\nsys.exit(0)",
        "import os\nf()\nos._exit(0)",
        "x = 1",
        "def check(g):\n    assert g() == 1",
        "f(object())",
        "f(",
        "import os\nf()\nos.write(1, b'{\"right\": true}')\nassert False",
        "raise KeyboardInterrupt",
    ],
)
def test_tests_that_never_come_to_their_end_let_nothing_pass(sandbox: Sandbox, tests: str) -> None:
    assert not is_right(sandbox, "def f(*x):\n    return 1", tests)


def test_a_program_sees_python_and_nothing_else(sandbox: Sandbox) -> None:
    answer = (
        "import os\ndef f():\n"
        "    return sorted(os.listdir('/dev')), os.environ.get('PATH'), os.listdir('/tmp'), os.getuid()\n"
        "def there(paths):\n    return [path for path in paths if os.path.exists(path)]"
    )
    tests = (
        "assert f() == (['null', 'urandom'], None, [], 65534)\n"
        "assert there(['/proc', '/etc', '/home', '/bin', '/usr/bin/sh', '/run', '/sys', '/var']) == []\n"
    )
    assert is_right(sandbox, answer, tests, "f", "there")


def test_a_program_gets_no_open_file_but_its_two_pipes(sandbox: Sandbox) -> None:
    answer = (
        "import os, stat\ndef f():\n    pipes = 0\n    for number in range(64):\n        try:\n"
        "            pipes += stat.S_ISFIFO(os.fstat(number).st_mode)\n        except OSError:\n            pass\n"
        "    return pipes"
    )
    assert is_right(sandbox, answer, "assert f() == 2")


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("open('/x', 'w')", "OSError"),
        ("open('/dev/x', 'w')", "OSError"),
        ("open('/usr/lib/x', 'w')", "OSError"),
        ("open('/tmp/x', 'wb').write(bytes(17 * 2**20))", "OSError"),
        ("[open(f'/tmp/{n}', 'wb').write(bytes(2**20)) for n in range(17)]", "OSError"),
        ("bytearray(2**28)", "MemoryError"),
        ("__import__('os').memfd_create('x')", "PermissionError"),
        ("__import__('socket').socket()", "PermissionError"),
        ("__import__('os').fork()", "PermissionError"),
        ("__import__('threading').Thread(target=print).start()", "RuntimeError"),
        ("[open('/dev/null') for _ in range(100)]", "OSError"),
        ("__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (2**40, 2**40))", "ValueError"),
        ("__import__('os').setuid(0)", "OSError"),
    ],
)
def test_what_is_not_allowed_fails_in_the_program(sandbox: Sandbox, attempt: str, error: str) -> None:
    answer = f"def f():\n    try:\n        {attempt}\n    except {error}:\n        return 'refused'"
    assert is_right(sandbox, answer, "assert f() == 'refused'")


@pytest.mark.parametrize("turn", range(12))
def test_a_cancelled_program_ends_at_once(sandbox: Sandbox, turn: int) -> None:
    """It is cancelled when its first process can be seen, now earlier, now later in bubblewrap's start."""
    before = set(psutil.Process().children())
    run = sandbox.start(SPEC, "while True:\n    pass")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run.verdict)
        while not set(psutil.Process().children()) - before:
            assert not running.done()
        run.cancel()
        assert isinstance(running.exception(30), UnavailableError) or not running.result().right  # it had 60 s


def test_a_run_that_was_cancelled_before_it_began_starts_nothing(sandbox: Sandbox) -> None:
    run = sandbox.start(SPEC, HONEST)
    run.cancel()
    with pytest.raises(UnavailableError, match="ended before it began"):
        run.verdict()


def test_programs_do_not_outlive_a_service_that_is_killed(sandbox: Sandbox) -> None:
    script = (
        "from tests.verify.sandbox.test_hacks import SPEC, sandbox_of\n"
        "sandbox_of(seconds=300).start(SPEC, 'while True:\\n    pass').verdict()"
    )
    service = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    try:
        while len(programs := psutil.Process(service.pid).children(recursive=True)) < 4:  # bubblewrap and Python, twice
            assert service.poll() is None
    finally:
        service.kill()
        service.wait()
    _, alive = psutil.wait_procs(programs, timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_where_bubblewrap_is_missing_programs_are_refused_with_what_to_do() -> None:
    sandbox = Sandbox("/nowhere/bwrap")
    assert "/nowhere/bwrap" in sandbox.problem and "apt-get install bubblewrap" in sandbox.problem
    with pytest.raises(FailedPreconditionError, match=r"^kind program: programs need bubblewrap"):
        sandbox.start(SPEC, HONEST)


def test_a_sandbox_that_stops_working_is_no_verdict(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    script = tmp_path / "bwrap"
    script.write_text(
        f'#!/bin/sh\nif [ -e {broken} ]; then echo "no rights for namespaces" >&2; exit 1; fi\n'
        f'exec {bubblewrap_program()} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    sandbox = Sandbox(str(script), ProgramLimits(seconds=60))
    if sandbox.problem:
        pytest.skip(f"the sandbox is NOT checked: {sandbox.problem}")
    assert sandbox.start(SPEC, HONEST).verdict().right
    files = len(list(Path("/proc/self/fd").iterdir()))
    broken.touch()
    with pytest.raises(UnavailableError, match="no rights for namespaces"):
        sandbox.start(SPEC, HONEST).verdict()
    assert "no rights for namespaces" in Sandbox(str(script)).problem
    assert len(list(Path("/proc/self/fd").iterdir())) == files
