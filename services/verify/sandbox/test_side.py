"""The process of the tests: run them with stand-ins for the answer's functions, and write the verdict.

This file is sent into the sandbox behind plain_data.py. No code of the answer is ever in this process.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from services.verify.sandbox.plain_data import decode, encode, limit, silence

_MOST_REPLY_BYTES = 4 * 2**20


class AnswerGoneError(BaseException):
    """The answer's process has ended, or replies with something else; no `except Exception` of a test catches it."""


class AnswerError(Exception):
    """An exception of the answer's that is no built-in one."""


class Answer:
    """The answer's process at the other end of the pipes."""

    def __init__(self, calls: int, replies: int) -> None:
        self._calls, self._replies = os.fdopen(calls, "wb"), os.fdopen(replies, "rb")
        self.num_calls = 0

    def receive(self) -> dict[str, Any]:
        """Return the next reply; raises AnswerGoneError."""
        try:
            line = self._replies.readline(_MOST_REPLY_BYTES)
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise AnswerGoneError("the answer's process ended, or sent no reply")
        return reply

    def send(self, request: Any) -> None:
        """Send a request; raises AnswerGoneError."""
        try:
            self._calls.write(json.dumps(request).encode() + b"\n")
            self._calls.flush()
        except OSError as error:
            raise AnswerGoneError("the answer's process ended") from error

    def function(self, name: str) -> Callable[..., Any]:
        """Return the stand-in for a function: it passes its arguments on, and returns or raises what comes back."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.num_calls += 1
            self.send([name, encode(arguments), encode(keywords)])
            reply = self.receive()
            if "error" in reply:
                raise _exception(str(reply["error"]), str(reply.get("text", "")))
            if "value" not in reply:
                raise AnswerGoneError("the answer's process sent no reply")
            try:
                return decode(reply["value"])
            except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
                raise AnswerGoneError(f"the answer's process sent a broken value: {error}") from error

        call.__name__ = name
        return call


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # such as UnicodeDecodeError, which wants more
            pass
    return AnswerError(f"{name}: {text}")


def main() -> None:
    """Judge one answer. Standard input brings the task as JSON, standard output takes the verdict."""
    limit(*json.loads(sys.argv[1]))
    task = json.loads(sys.stdin.buffer.read())
    verdict = os.fdopen(os.dup(1), "wb")
    silence()
    answer = Answer(*task["pipes"])
    found = {"nonce": task["nonce"], "right": False, "reason": "", "started": False}
    try:
        answer.receive()
        found["started"] = True
        answer.send(task["program"])
        reply = answer.receive()
        if "error" in reply:
            found["reason"] = f"the answer raises {reply['error']}: {reply.get('text', '')}"
        else:
            found["reason"] = _failed_test(task, answer)
            found["right"] = not found["reason"]
    except AnswerGoneError as error:
        found["reason"] = str(error)
    verdict.write(json.dumps(found).encode())
    verdict.close()


def _failed_test(task: dict[str, Any], answer: Answer) -> str:
    """Run the tests; return why the answer fails them, or an empty string."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        prompt = compile(task["prompt"], "prompt", "exec")
    except SyntaxError:  # the beginning of a function without a body
        prompt = compile("", "prompt", "exec")
    try:
        exec(prompt, namespace)
        namespace.update({name: answer.function(name) for name in task["functions"]})
        exec(compile(task["tests"], "tests", "exec"), namespace)
    except AnswerGoneError:
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
        return f"{type(error).__name__} in line {lines[-1] if lines else 0} of the tests: {str(error)[:500]}"
    return "" if answer.num_calls else "the tests call none of the functions"
