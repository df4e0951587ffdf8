"""Judge programs: two sandboxes for each answer, one with its code and one with the tests, and the pipes between."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess

from fusion_core.verify.programs import program_of
from fusion_core.verify.specs import ProgramSpec
from fusion_core.verify.verdict import Verdict, failed, passed
from services.base.errors import FailedPreconditionError, UnavailableError
from services.verify.sandbox.bubblewrap import HOW_TO_INSTALL, find_bubblewrap
from services.verify.sandbox.output_run import OutputRun
from services.verify.sandbox.process import SandboxProcess
from services.verify.sandbox.run import ProgramLimits, SandboxRun
from services.verify.sandbox.seccomp import call_filter

_MOST_VERDICT_BYTES = 64 * 1024
_TRIAL = ProgramSpec(("same",), "assert same(1) == 1")


class Sandbox:
    """A way to run programs on this machine. Thread-safe.

    Args:
        bubblewrap: its program; by default the one in PATH.
        limits: of every program.
    """

    def __init__(self, bubblewrap: str | None = None, limits: ProgramLimits | None = None) -> None:
        self.limits = limits or ProgramLimits()
        self._bubblewrap = find_bubblewrap(bubblewrap)
        self.problem = self._find_problem(bubblewrap)

    def _find_problem(self, named: str | None) -> str:
        """Run a program that is right; return why this machine cannot, or an empty string."""
        if self._bubblewrap is None:
            where = f"there is no {named}" if named else "bwrap is not in PATH"
            return f"programs need bubblewrap, and {where}: {HOW_TO_INSTALL}"
        try:
            call_filter(platform.machine())
            verdict = self._start(_TRIAL, "def same(x):\n    return x\n").verdict()
        except (ValueError, OSError, UnavailableError) as error:
            return f"programs cannot be run here: {error}"
        return "" if verdict.right else f"programs cannot be run here: {verdict.reason}"

    def start(self, spec: ProgramSpec, answer: str) -> ProgramRun:
        """Return a run that has not begun; raises FailedPreconditionError where programs cannot be run."""
        if self.problem:
            raise FailedPreconditionError(f"kind program: {self.problem}")
        return self._start(spec, answer)

    def run(self, program: str, max_output_bytes: int) -> OutputRun:
        """Return a run for the output of a program that has not begun; raises as `start`."""
        if self.problem:
            raise FailedPreconditionError(f"program: {self.problem}")
        assert self._bubblewrap is not None
        return OutputRun(self._bubblewrap, self.limits, program, max_output_bytes)

    def _start(self, spec: ProgramSpec, answer: str) -> ProgramRun:
        assert self._bubblewrap is not None
        return ProgramRun(self._bubblewrap, self.limits, spec, answer)


class ProgramRun(SandboxRun):
    """One answer's program and its tests."""

    def __init__(self, bubblewrap: str, limits: ProgramLimits, spec: ProgramSpec, answer: str) -> None:
        super().__init__(bubblewrap, limits)
        self._spec, self._answer = spec, answer

    def verdict(self) -> Verdict:
        """Run both sides and return the verdict; afterwards no process of theirs is left.

        Raises UnavailableError when the sandbox itself does not work: that says nothing about the answer.
        """
        nonce = secrets.token_hex(16)
        try:
            tests, pipes = self._open()
            self._timer.start()
            said = self._ask(tests, nonce, pipes)
        except OSError as error:
            raise UnavailableError(f"the sandbox cannot be started: {error}") from error
        finally:
            problem = self._end()
        return self._judged(said, nonce, problem)

    def _open(self) -> tuple[SandboxProcess, tuple[int, int]]:
        """Start both sides; return the tests', and the tests' ends of the pipes."""
        calls_read, calls_write = os.pipe()
        replies_read, replies_write = os.pipe()
        try:
            self._spawn("answer_side", stdin=calls_read, stdout=replies_write)
            pipes = (calls_write, replies_read)
            tests = self._spawn("test_side", stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pipes)
        finally:
            for descriptor in (calls_read, calls_write, replies_read, replies_write):
                os.close(descriptor)
        return tests, pipes

    def _ask(self, tests: SandboxProcess, nonce: str, pipes: tuple[int, int]) -> bytes:
        """Send the task to the tests' side, and return all that it says until it ends or is killed."""
        spec = self._spec
        task = {
            "nonce": nonce,
            "pipes": pipes,
            "program": program_of(self._answer, spec.prompt),
            "prompt": spec.prompt,
            "functions": spec.functions,
            "tests": spec.tests,
        }
        try:
            with tests.stdin as stdin:
                stdin.write(json.dumps(task).encode())
        except BrokenPipeError:
            return b""
        return tests.stdout.read(_MOST_VERDICT_BYTES)

    def _judged(self, said: bytes, nonce: str, problem: str) -> Verdict:
        try:
            found = json.loads(said)
        except ValueError:
            found = {}
        if isinstance(found, dict) and found.get("nonce") == nonce and found["started"]:
            return passed() if found["right"] is True else failed(str(found["reason"]) or "a test failed")
        if self._late:
            return failed(f"no verdict within {self._limits.seconds:g} s")
        if problem or found:
            raise UnavailableError(f"the sandbox does not work: {problem or 'a process did not start'}")
        return failed("the tests ended without a verdict")
