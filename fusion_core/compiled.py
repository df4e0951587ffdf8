"""Compiled loops: Numba without the interpreter lock, machine code kept beside the source between runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """`numba.njit(cache=True, nogil=True)` that keeps the function's type."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))
