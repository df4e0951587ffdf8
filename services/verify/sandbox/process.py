"""One process in a sandbox: started, killed with all that it holds, and waited for."""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from services.verify.sandbox.bubblewrap import sandbox_command
from services.verify.sandbox.seccomp import call_filter

_LAST_SECONDS = 5.0
"""Time that a killed process has to be gone, before bubblewrap itself is killed."""
_MOST_ERROR_BYTES = 1024


class SandboxProcess:
    """A program in bubblewrap. Its standard error is read here: whatever is in it, bubblewrap or the start wrote.

    Args:
        bubblewrap: its program.
        words: the program in the sandbox, with its arguments.
        scratch_bytes: size of its /tmp.
        pass_fds: open files that it gets, under the same numbers.
        streams: stdin and stdout, as for subprocess.Popen.
    """

    def __init__(
        self,
        bubblewrap: str,
        words: Sequence[str],
        *,
        scratch_bytes: int,
        pass_fds: tuple[int, ...] = (),
        **streams: Any,
    ) -> None:
        self._told = False
        self._child_number: int | None = None
        filter_read, filter_write = os.pipe()
        self._info, info_write = os.pipe()
        try:
            os.write(filter_write, call_filter(platform.machine()))
            os.close(filter_write)
            command = sandbox_command(bubblewrap, scratch_bytes=scratch_bytes, filter_descriptor=filter_read)
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [*command, "--info-fd", str(info_write), *words],
                stderr=subprocess.PIPE,
                pass_fds=(*pass_fds, filter_read, info_write),
                cwd="/",
                process_group=0,  # see `kill`
                **streams,
            )
        except BaseException:
            os.close(self._info)
            raise
        finally:
            os.close(filter_read)
            os.close(info_write)

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def exit_code(self) -> int | None:
        """The exit code of the program in the sandbox, 128 and the signal's number for one that was killed."""
        return self._process.returncode

    def kill(self) -> None:
        """Kill it, from any thread. The first process in the sandbox goes, and the kernel ends the others with it.

        Bubblewrap then sees the end of its child and ends as well; killed itself it would leave a zombie behind. Until
        it has said which process that is, the child waits for it, in its group: killed alone, it would leave a child
        that waits for good and holds the pipes.
        """
        if self._process.poll() is None:
            child = self._child()
            if child is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                os.kill(child, signal.SIGKILL)

    def wait(self, patience_seconds: float) -> None:
        """Wait until it has ended; it is killed when that takes longer than `patience_seconds`."""
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            try:
                self._process.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def close(self) -> str:
        """Close the pipes of a process that has ended; return what it said on its standard error."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            said = stream.read(_MOST_ERROR_BYTES).decode(errors="replace").strip()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        os.close(self._info)
        return said

    def _child(self) -> int | None:
        """Return the number of the first process in the sandbox, or None where bubblewrap has not said it.

        What it says is read once: nothing that might come later is believed.
        """
        if not self._told and select.select([self._info], [], [], 0)[0]:
            self._told = True
            with suppress(ValueError, KeyError):
                self._child_number = int(json.loads(os.read(self._info, 4096))["child-pid"])
        return self._child_number
