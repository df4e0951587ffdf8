"""The tool `python` of a chat: programs run in the sandbox, at the recipe's verifier or in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from services.base.errors import FailedPreconditionError
from services.recipes.recipe import Recipe
from services.verify.client import VerifierClient
from services.verify.config import VerifyConfig
from services.verify.sandbox.output_run import ProgramOutput
from services.verify.verifier import Verifier
from services.wire.tool_calls import PYTHON, ToolCall

MOST_OUTPUT_BYTES = 2048
"""Bytes of a program's output that the model gets."""
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PYTHON,
        "description": "Run a Python program. Returns what it prints and the value of its last expression. Every "
        "program starts anew, without network and files; only the standard library is there.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program."}},
            "required": ["code"],
        },
    },
}
"""The tool as chat templates take it."""
INSTRUCTION = (
    "You can run Python programs. To run one, write it in a code block that begins with ```python, print the result, "
    "and end your message behind the block. The output comes back in the next message. Every program starts anew; only "
    "the standard library is there."
)
"""The system message for models whose chat template has no place for tools."""

_Run: TypeAlias = Callable[[str, int], Awaitable[ProgramOutput]]
_Close: TypeAlias = Callable[[], Awaitable[None]]


class PythonTool:
    """Runs programs on the running event loop; made by `open`.

    Attributes:
        where: where they run, for the user.
    """

    def __init__(self, where: str, run: _Run, close: _Close, seconds: float) -> None:
        self.where, self.close = where, close
        self._run, self._seconds = run, seconds

    @classmethod
    async def open(cls, recipe: Recipe) -> PythonTool:
        """Return the tool after a look at its sandbox.

        Raises FailedPreconditionError where there is none, UnavailableError where the verifier cannot be reached.
        """
        if recipe.verify is not None:
            return await cls._served(recipe.verify, recipe.verify.address or f"127.0.0.1:{recipe.service.grpc_port}")
        verifier = await asyncio.to_thread(Verifier, VerifyConfig())

        async def close() -> None:
            await asyncio.to_thread(verifier.close)

        if problem := verifier.sandbox.problem:
            await close()
            raise FailedPreconditionError(f"--tools python: {problem}")
        return cls("a sandbox on this machine", verifier.run, close, verifier.sandbox.limits.seconds)

    @classmethod
    async def _served(cls, config: VerifyConfig, address: str) -> PythonTool:
        client = VerifierClient(address, config.application)
        try:
            info = await client.info()
            if not info.max_output_bytes:
                problem = info.sandbox_problem or "it runs a version that judges programs only"
                raise FailedPreconditionError(f"--tools python: the verifier at {address}: {problem}")
        except BaseException:
            await client.close()
            raise
        return cls(f"the verifier at {address}", client.run, client.close, info.program_seconds)

    async def result(self, call: ToolCall) -> str:
        """Return what the model gets for a call; raises ServiceError when the sandbox itself fails."""
        code = call.arguments.get("code")
        if call.name != PYTHON:
            return f"error: there is no tool {call.name[:80]!r}; allowed is {PYTHON}"
        if not isinstance(code, str):
            return f"error: {PYTHON} takes one argument, the string code"
        found = await self._run(code, MOST_OUTPUT_BYTES)
        text = found.output.decode("utf-8", errors="replace")
        match found.end:
            case "late":
                return f"{text}\n[killed: the program took longer than {self._seconds:g} s]".lstrip("\n")
            case "too_long":
                return f"{text}\n[cut: only the first {MOST_OUTPUT_BYTES} bytes of the output; the program was killed]"
            case "failed":
                return text or "[the program failed without output]"
        return text or "[no output]"
