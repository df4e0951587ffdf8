"""Values on the pipes between an answer and its tests: JSON of plain data, so that no code travels with them.

This file is sent into the sandbox in front of answer_side.py and test_side.py; it may import the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def encode(value: Any) -> Any:
    """Return the JSON form of plain data, of which a subclass becomes its base; raises TypeError for anything else."""
    if value is None or isinstance(value, bool):
        return value
    for kind, (name, write, _) in _KINDS.items():
        if isinstance(value, kind):
            return [name, write(value)]
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(form: Any) -> Any:
    """Return the value of a JSON form; raises ValueError or TypeError for a form that is broken."""
    if form is None or isinstance(form, bool):
        return form
    name, content = form
    return _READERS[name](content)


def _encode_all(values: Any) -> list[Any]:
    return [encode(value) for value in values]


def _decode_all(forms: Any) -> list[Any]:
    return [decode(form) for form in forms]


_KINDS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    str: ("str", str.__str__, str),
    int: ("int", lambda value: hex(int.__index__(value)), lambda content: int(content, 16)),
    float: ("float", float.hex, float.fromhex),
    complex: (
        "complex",
        lambda value: [float.hex(value.real), float.hex(value.imag)],
        lambda content: complex(*map(float.fromhex, content)),
    ),
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    list: ("list", _encode_all, _decode_all),
    tuple: ("tuple", _encode_all, lambda content: tuple(_decode_all(content))),
    set: ("set", _encode_all, lambda content: set(_decode_all(content))),
    frozenset: ("frozenset", _encode_all, lambda content: frozenset(_decode_all(content))),
    dict: (
        "dict",
        lambda value: [_encode_all(pair) for pair in value.items()],
        lambda content: dict(map(_decode_all, content)),
    ),
}
"""For each kind of value its name on the pipe, and the functions that write and read what is in it."""
_READERS = {name: read for name, _, read in _KINDS.values()}


def limit(memory_bytes: int, file_bytes: int, cpu_seconds: int) -> None:
    """Set what this process may use, for good; raises ValueError when the machine allows less."""
    import resource

    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def silence() -> None:
    """Let standard input, output and errors lead to nothing."""
    import os

    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
