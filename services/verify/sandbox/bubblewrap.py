"""The command line of bubblewrap: a root without anything but Python, no network, no rights.

The root holds the interpreter, its standard library and the system's libraries, read-only, /dev/null and
/dev/urandom, and a /tmp of limited size. There is no /proc, no shell and no other file.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/urandom")
HOW_TO_INSTALL = "install it, such as with `apt-get install bubblewrap`, or name it in `bwrap`"


def find_bubblewrap(path: str | None) -> str | None:
    """Return the program: the one that is named, or else the one in PATH; None where there is none."""
    return shutil.which(path or "bwrap")


def interpreter() -> list[str]:
    """Return the Python that runs programs: this one without its environment, isolated, without site-packages."""
    return [_executable(), "-I", "-S", "-B"]


def sandbox_command(bubblewrap: str, *, scratch_bytes: int, filter_descriptor: int) -> list[str]:
    """Return the words in front of the program's own.

    Args:
        bubblewrap: its program.
        scratch_bytes: size of /tmp.
        filter_descriptor: an open file with the filter of system calls.
    """
    devices = [word for device in _DEVICES for word in ("--dev-bind", device, device)]
    return [
        bubblewrap,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *("--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"),
        *("--setenv", "LD_LIBRARY_PATH", f"{sys.base_prefix}/lib"),  # there is no cache of libraries
        *_files(),
        *devices,
        *("--size", str(scratch_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),  # else files could be written there, without any limit
        *("--seccomp", str(filter_descriptor)),
    ]


def _executable() -> str:
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _files() -> Iterator[str]:
    for library in map(Path, _LIBRARIES):
        if library.is_symlink():
            yield from ("--symlink", str(library.readlink()), str(library))
        elif library.is_dir():
            yield from ("--ro-bind", str(library), str(library))
    for path in (f"{sys.base_prefix}/lib", _executable()):
        yield from ("--ro-bind", path, path)
