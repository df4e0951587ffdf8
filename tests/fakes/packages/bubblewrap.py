"""Bubblewrap: from PATH, else out of Debian's package, unpacked without being installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from services.base.atomic import whole_file
from services.base.home import FetchError, exclusive
from services.models.packages import Package, download, members

_PACKAGE = Package(
    "debian", "bubblewrap", "0.8.0-2+deb12u1", "3cc9134a3286ad01a323dcd924ba123eb634cefaeec82d774257e06308aeaadb"
)
_TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llm-fusion" / "tools"


def bubblewrap_program() -> Path:
    """Path of `bwrap`. Without it the test is skipped, or fails where REQUIRE_TOOLS is set."""
    if found := shutil.which("bwrap"):
        return Path(found)
    program = _TOOLS / "bubblewrap" / "bwrap"
    try:
        with exclusive(program.parent):
            if not program.is_file():
                _unpack(program)
    except FetchError as error:
        assert not os.environ.get("REQUIRE_TOOLS"), f"bwrap is needed where REQUIRE_TOOLS is set: {error}"
        pytest.skip(f"bubblewrap cannot be had, so the sandbox is NOT checked: {error}")
    return program


def _unpack(program: Path) -> None:
    [(_, data)] = members(download(_PACKAGE), "usr/bin/bwrap")
    program.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(program) as partial:
        partial.write_bytes(data)
        partial.chmod(0o755)
