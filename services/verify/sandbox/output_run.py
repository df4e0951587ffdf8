"""Run one program in a sandbox for its output."""

from __future__ import annotations

import json
import secrets
import subprocess
from dataclasses import dataclass
from typing import Literal, TypeAlias

from services.base.errors import UnavailableError
from services.verify.sandbox.run import ProgramLimits, SandboxRun

ProgramEnd: TypeAlias = Literal["finished", "failed", "late", "too_long"]


@dataclass(frozen=True, slots=True)
class ProgramOutput:
    """The output of a program.

    Attributes:
        output: bytes that it wrote, errors included, up to the bound; a program can write anything.
        end: `finished`; `failed` with an exception, an exit code or a signal; `late`, killed when its time was up;
            `too_long`, killed when it wrote more than the bound.
    """

    output: bytes
    end: ProgramEnd


class OutputRun(SandboxRun):
    """One program, which gets no input."""

    def __init__(self, bubblewrap: str, limits: ProgramLimits, program: str, max_output_bytes: int) -> None:
        super().__init__(bubblewrap, limits)
        self._program, self._max_output_bytes = program, max_output_bytes

    def output(self) -> ProgramOutput:
        """Run the program and return its output; afterwards no process of it is left.

        Raises UnavailableError when the sandbox itself does not work: that says nothing about the program.
        """
        mark = secrets.token_hex(16)
        written, code = b"", None
        try:
            process = self._spawn("output_side", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._timer.start()
            task = {"mark": mark, "program": self._program.encode(errors="replace").decode()}
            try:
                with process.stdin as stdin:
                    stdin.write(json.dumps(task).encode() + b"\n")
            except BrokenPipeError:
                pass
            written = process.stdout.read(len(mark) + self._max_output_bytes + 1)
            if len(written) > len(mark) + self._max_output_bytes:
                process.kill()
            process.wait(self._limits.seconds)  # its output may be closed while it still runs
            code = process.exit_code
        except OSError as error:
            raise UnavailableError(f"the sandbox cannot be started: {error}") from error
        finally:
            problem = self._end()
        if not written.startswith(mark.encode()):
            if self._late:
                return ProgramOutput(b"", "late")
            raise UnavailableError(f"the sandbox does not work: {problem or 'the process did not start'}")
        output = written[len(mark) :]
        if len(output) > self._max_output_bytes:
            return ProgramOutput(output[: self._max_output_bytes], "too_long")
        if self._late:
            return ProgramOutput(output, "late")
        return ProgramOutput(output, "finished" if code == 0 else "failed")
