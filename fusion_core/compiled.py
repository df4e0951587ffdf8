"""Compiled loops: Numba without the interpreter lock, machine code kept beside the source between runs.

The cache of a function notices changes in its own file only: after changing one that others call, clear __pycache__.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """`numba.njit(nogil=True)`, cached on disk where there is a place for it, that keeps the function's type."""
    try:
        return cast(_Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # a container whose file system is read-only: compile anew in every process
        return cast(_Function, numba.njit(nogil=True)(function))
