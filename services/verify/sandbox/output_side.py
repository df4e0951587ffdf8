"""The process of a program whose output is wanted: run it as an interpreter runs a cell.

Standard input brings the program, standard output takes the mark that it starts, and then all that it writes, errors
included. The value of a last expression is written too. This file is sent into the sandbox behind plain_data.py.
"""

from __future__ import annotations

import ast
import io
import json
import linecache
import os
import sys
import traceback
import types

from services.verify.sandbox.plain_data import limit


def main() -> None:
    """Run one program; the exit code is 0 when it came to its end, 1 when it raised an exception."""
    limit(*json.loads(sys.argv[1]))
    task = json.loads(sys.stdin.buffer.readline())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(1, 2)
    os.write(1, task["mark"].encode())
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w"), encoding="utf-8", errors="replace", write_through=True)
        for number in (1, 2)
    )
    os._exit(0 if _run(task["program"]) else 1)  # whatever exit handlers the program has left


def _run(program: str) -> bool:
    """Run a program; return whether it came to its end."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.cache["program"] = (len(program), None, program.splitlines(keepends=True), "program")
    try:
        body = ast.parse(program, "program").body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "program", "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program", "eval"), module.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)  # as an interpreter does
        return end.code in (None, 0)
    except BaseException as error:
        within = error.__traceback__
        while within is not None and within.tb_frame.f_code.co_filename != "program":
            within = within.tb_next
        sys.stderr.write("".join(traceback.format_exception(type(error), error, within)))
        return False
    return True
