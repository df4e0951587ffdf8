"""Files and folders that appear whole or not at all, also when their writer is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.base.atomic import ABANDONED_SECONDS, sweep_partial, whole_file, whole_folder, write_whole
from services.base.home import exclusive

_KILLED = """
import os, signal, sys
from pathlib import Path
from services.base.atomic import whole_file, whole_folder
with {form}(Path(sys.argv[1])) as partial:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for inner in (*path.rglob("*"), path):
        os.utime(inner, (then, then))


@pytest.mark.parametrize(
    ("form", "write"),
    [("whole_file", "partial.write_bytes(b'half')"), ("whole_folder", "(partial / 'a').write_bytes(b'half')")],
)
def test_a_killed_writer_leaves_nothing_at_the_path_and_is_swept_up_after(
    tmp_path: Path, form: str, write: str
) -> None:
    target = tmp_path / "wanted"
    done = subprocess.run([sys.executable, "-c", _KILLED.format(form=form, write=write), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert sweep_partial(tmp_path) == []  # too young: another container of this host name may be writing it
    _age(left, 2 * ABANDONED_SECONDS)
    assert sweep_partial(tmp_path) == [left]
    assert list(tmp_path.iterdir()) == []


def test_the_next_maker_under_the_lock_clears_up_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "made[1]"
    script = _KILLED.format(form="whole_folder", write="(partial / 'a').write_bytes(b'half')")
    subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    write_whole(tmp_path / "made1.partial-not", b"")
    with exclusive(folder):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".made[1].lock", "made1.partial-not"]


def test_what_a_living_process_or_another_machine_writes_is_not_swept(tmp_path: Path) -> None:
    mine = tmp_path / f".a.{socket.gethostname()}.{os.getpid()}.00.partial"
    foreign = tmp_path / ".a.elsewhere.1.00.partial"
    other = tmp_path / "a"
    for path in (mine, foreign, other):
        path.write_bytes(b"x")
        _age(path, 2 * ABANDONED_SECONDS)
    assert sweep_partial(tmp_path) == []
    _age(foreign, 30 * 86_400)
    assert sweep_partial(tmp_path) == [foreign]


def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_whole(file, "before")
    with whole_folder(folder) as partial:
        write_whole(partial / "inner", b"before")
    with pytest.raises(ZeroDivisionError), whole_file(file) as partial:
        partial.write_text("after")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), whole_folder(folder, replace=True) as partial:
        raise ZeroDivisionError
    assert (file.read_text(), (folder / "inner").read_text()) == ("before", "before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text, replace in (("one", False), ("two", True)):
        with whole_folder(folder, replace=replace) as partial:
            (partial / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["two"]
    with pytest.raises(OSError, match="not empty"), whole_folder(folder) as partial:
        (partial / "three").write_text("three")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _write_many(path: Path, letter: bytes) -> None:
    for _ in range(50):
        write_whole(path, letter * 100_000)


def test_readers_beside_two_writers_see_only_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"a" * 100_000)
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write_many, args=(path, letter)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {b"a" * 100_000, b"b" * 100_000}
    assert list(tmp_path.iterdir()) == [path]
