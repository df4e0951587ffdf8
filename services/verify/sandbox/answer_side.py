"""The process of the answer: define its functions, then answer calls until the tests' side is gone.

Whatever the answer does in here, it can only change what its own functions reply. This file is sent into the sandbox
behind plain_data.py.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any, BinaryIO

from services.verify.sandbox.plain_data import decode, encode, limit, silence


def main() -> None:
    """Serve one answer. Standard input brings the program and the calls, standard output takes the replies."""
    limit(*json.loads(sys.argv[1]))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence()
    _send(replies, {"started": True})
    program = json.loads(requests.readline())
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # where dataclasses look
    try:
        exec(compile(program, "answer", "exec"), module.__dict__)
    except BaseException as error:
        _send(replies, _failure(error))
        return
    _send(replies, {"defined": True})
    for line in requests:
        name, arguments, keywords = json.loads(line)
        try:
            result = module.__dict__[name](*decode(arguments), **decode(keywords))
            _send(replies, {"value": encode(result)})
        except KeyError as error:
            missing = name not in module.__dict__
            _send(replies, {"error": "NameError", "text": f"{name} is not defined"} if missing else _failure(error))
        except BaseException as error:
            _send(replies, _failure(error))


def _send(replies: BinaryIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def _failure(error: BaseException) -> dict[str, str]:
    return {"error": type(error).__name__, "text": str(error)[:500]}
