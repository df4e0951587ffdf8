"""Turn an answer to a programming task into a program, and name its tests.

Nothing here compiles or runs what an answer says: text in, text out. The program is run by a sandbox, beside the tests
and not with them (services/verify/sandbox).
"""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*+(```++|~~~++)[ \t]*+([\w+-]*+)[^\n`]*+$", re.MULTILINE)
_PYTHON = frozenset({"", "python", "py", "python3"})


def code_of(answer: str) -> str:
    """Return the code of an answer: its last code block of Python, else all of it.

    A block that is not closed, as in an answer that was cut, ends with the answer.
    """
    last, opened = None, None
    for fence in _FENCE.finditer(answer):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            if opened[2].casefold() in _PYTHON:
                last = answer[opened.end() + 1 : fence.start()]
            opened = None
    if opened is not None and opened[2].casefold() in _PYTHON:
        last = answer[opened.end() + 1 :]
    return answer if last is None else last


def program_of(answer: str, prompt: str = "") -> str:
    """Return the program of an answer to a prompt that is the beginning of a program, such as HumanEval's.

    Code that begins indented goes on where the prompt stops. Other code stands alone, below the prompt's own code: it
    may define the function anew, and use the prompt's imports.
    """
    code = code_of(answer)
    first = next((line for line in code.split("\n") if line.strip()), "")
    if not prompt or first[:1] in {" ", "\t"}:
        return prompt + code
    return f"{prompt.rstrip()}\n{_PASS}\n{code}" if _ends_in_signature(prompt) else f"{prompt}\n\n{code}"


_PASS = "    pass\n"


def _ends_in_signature(prompt: str) -> bool:
    """Return whether the prompt ends with a line that opens a block, so that nothing could follow unindented."""
    return prompt.rstrip().endswith(":")
