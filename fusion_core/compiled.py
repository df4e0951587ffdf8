"""Compiled loops: Numba without the interpreter lock, machine code kept on disk between runs.

Numba keys the machine code of a function by the function's own file, and so would go on using code in which an older
version of a callee or of an imported constant is compiled. Here the key is a digest of all modules with compiled loops
and of the modules of this package that these import.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import caching

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., object])
_PACKAGE = Path(__file__).parent


def compiled(function: _Function) -> _Function:
    """Compile as `numba.njit(nogil=True)` does, cached on disk where there is a place for it; the type is kept."""
    dispatcher = numba.njit(nogil=True)(function)
    before = numba.config.CACHE_LOCATOR_CLASSES
    numba.config.CACHE_LOCATOR_CLASSES = ",".join(
        f"{__name__}.{locator.__name__}" for locator in (InCacheFolder, BesideTheSource, InHome)
    )
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # a container whose file system is read-only
        logger.debug("no folder to keep machine code in: %s is compiled in every process", function.__qualname__)
    finally:
        numba.config.CACHE_LOCATOR_CLASSES = before
    return cast(_Function, dispatcher)


@functools.cache
def kernel_digest(package: Path = _PACKAGE) -> str:
    """Return a digest of all code that machine code can depend on, without comments and docstrings."""
    trees = {_module(package, file): ast.parse(file.read_bytes()) for file in sorted(package.rglob("*.py"))}
    imports = {name: set(_imports(tree)) for name, tree in trees.items()}
    relevant = {name for name, imported in imports.items() if any(module == __name__ for module in imported)}
    pending = list(relevant)
    while pending:
        for module in imports[pending.pop()]:
            # `from package import name` may name a module or something in the package itself.
            if module in trees and module not in relevant:
                relevant.add(module)
                pending.append(module)
    digest = hashlib.sha256()
    for name in sorted(relevant):
        digest.update(f"{name}\0{ast.dump(_without_docstrings(trees[name]))}\0".encode())
    return digest.hexdigest()


def _module(package: Path, file: Path) -> str:
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Return the modules that a module imports, and the names that it takes from them as if these were modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return tree


class _OfAllKernels:
    """Machine code that is fresh as long as the digest of all kernels is the one that it was compiled under."""

    def get_source_stamp(self) -> str:
        return kernel_digest()


class InCacheFolder(_OfAllKernels, caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """Machine code in `NUMBA_CACHE_DIR`, where that is set."""


class BesideTheSource(_OfAllKernels, caching.InTreeCacheLocator):  # type: ignore[misc]
    """Machine code in `__pycache__` beside the module, where that can be written."""


class InHome(_OfAllKernels, caching.UserWideCacheLocator):  # type: ignore[misc]
    """Machine code in the user's cache folder, where there is a user with a home."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        if Path(caching.AppDirs(appname="numba", appauthor=False).user_cache_dir).is_absolute():
            return super().from_function(py_func, py_file)
        return None
