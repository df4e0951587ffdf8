"""Judge answers, and run programs for their output: in the sandbox, some at once; everything else in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fusion_core.verify.specs import KINDS, ProgramSpec, Spec
from fusion_core.verify.verdict import Verdict
from services.verify.config import VerifyConfig
from services.verify.sandbox.output_run import ProgramOutput
from services.verify.sandbox.run import ProgramLimits, SandboxRun
from services.verify.sandbox.sandbox import Sandbox

T = TypeVar("T")


class Verifier:
    """The judge of all kinds of answers. Lives on one event loop; making it runs a program, which takes a moment.

    Attributes:
        sandbox: where programs run; its `problem` says why they cannot.
    """

    def __init__(self, config: VerifyConfig) -> None:
        limits = ProgramLimits(seconds=config.program_seconds, memory_bytes=config.program_memory_bytes)
        self.sandbox = Sandbox(config.bwrap, limits)
        self._running: set[SandboxRun] = set()
        self._threads = ThreadPoolExecutor(config.programs_at_once, thread_name_prefix="programs")

    @property
    def kinds(self) -> list[str]:
        """The kinds of specs that are judged here."""
        return [kind for kind in KINDS if kind != "program" or not self.sandbox.problem]

    @property
    def programs_running(self) -> int:
        """The number of programs that run now."""
        return len(self._running)

    async def judge(self, spec: Spec, text: str) -> Verdict:
        """Return the verdict; when the caller is cancelled, the program is killed.

        Raises FailedPreconditionError for a program where there is no sandbox, UnavailableError when the sandbox fails.
        """
        if not isinstance(spec, ProgramSpec):
            return await asyncio.to_thread(spec.judge, text)  # linear in the text, so no thread is kept for long
        run = self.sandbox.start(spec, text)
        return await self._in_thread(run, run.verdict)

    async def run(self, program: str, max_output_bytes: int) -> ProgramOutput:
        """Return the output of a program; when the caller is cancelled, the program is killed.

        Raises FailedPreconditionError where there is no sandbox, UnavailableError when the sandbox fails.
        """
        run = self.sandbox.run(program, max_output_bytes)
        return await self._in_thread(run, run.output)

    async def _in_thread(self, run: SandboxRun, wait: Callable[[], T]) -> T:
        def counted() -> T:
            self._running.add(run)
            try:
                return wait()
            finally:
                self._running.discard(run)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, counted)
        except asyncio.CancelledError:
            run.cancel()
            raise

    def close(self) -> None:
        """Wait for the programs that run; those that wait are not started."""
        self._threads.shutdown(cancel_futures=True)
