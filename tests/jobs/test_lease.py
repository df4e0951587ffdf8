"""Leases: the second trainer of a run is refused while the first lives, and takes over what a dead one left."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from services.base.errors import FailedPreconditionError
from services.base.files import Files
from services.jobs.lease import LeaseLostError, held_leases


def hold(folder: str, holding: Event) -> None:
    with held_leases([folder], "fused"):
        holding.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of a run in `tmp_path`."""
    holding = multiprocessing.Event()
    process = multiprocessing.Process(target=hold, args=(str(tmp_path), holding), daemon=True)
    process.start()
    assert holding.wait(60)
    yield process
    process.kill()
    process.join()


def claims(folder: Path) -> list[Path]:
    return list((folder / ".lease").glob("*.json"))


def foreign_claim(location: str, **changes: object) -> tuple[Files, str]:
    """The file of a holder on a machine that cannot be looked at."""
    files, path = Files(location, "distill.storage"), ".lease/other.json"
    files.write(path, json.dumps({"host": "node-7", "pid": 4, "machine": "another", "renewals": 1, **changes}).encode())
    return files, path


def test_a_second_process_is_refused_by_name_and_changes_nothing(tmp_path, holder):
    before = claims(tmp_path)
    with (
        pytest.raises(FailedPreconditionError, match=f"run fused: process {holder.pid} on .* trains it since"),
        held_leases([str(tmp_path)], "fused"),
    ):
        raise AssertionError("two hold the lease")
    assert claims(tmp_path) == before


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert len(claims(tmp_path)) == 1
    with held_leases([str(tmp_path)], "fused"):
        [claim] = claims(tmp_path)
        assert json.loads(claim.read_text())["pid"] == os.getpid()
    assert claims(tmp_path) == []


@pytest.mark.parametrize("url", [False, True])
def test_a_silent_holder_on_another_machine_is_replaced_and_a_living_one_is_not(tmp_path, url):
    location = f"memory://{tmp_path}" if url else str(tmp_path)
    files, path = foreign_claim(location)
    with held_leases([location], "fused", renew_seconds=0.1, stale_seconds=0.3):
        assert files.read(path) is None

    files, path = foreign_claim(location)
    ended = threading.Event()

    def renew() -> None:
        renewals = 1
        while not ended.wait(0.05):
            renewals += 1
            foreign_claim(location, renewals=renewals)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(FailedPreconditionError, match="process 4 on node-7"),
            held_leases([location], "fused", renew_seconds=0.1, stale_seconds=60.0),
        ):
            raise AssertionError("two hold the lease")
    finally:
        ended.set()
        thread.join()


def test_a_lease_that_was_taken_over_interrupts_its_holder(tmp_path):
    interrupted = threading.Event()
    with (
        pytest.raises(LeaseLostError, match="another process has taken it over"),
        held_leases([str(tmp_path)], "fused", renew_seconds=0.05, interrupt=interrupted.set),
    ):
        for claim in claims(tmp_path):
            claim.unlink()
        assert interrupted.wait(60)


def test_a_lease_is_renewed_while_it_is_held(tmp_path):
    with held_leases([str(tmp_path)], "fused", renew_seconds=0.02):
        [claim] = claims(tmp_path)
        while json.loads(claim.read_text())["renewals"] < 3:
            pass


def test_two_places_are_held_together_or_not_at_all(tmp_path, holder):
    with pytest.raises(FailedPreconditionError), held_leases([str(tmp_path / "a"), str(tmp_path)], "fused"):
        raise AssertionError("two hold the lease")
    assert claims(tmp_path / "a") == []


RACING = """
import sys
from services.base.errors import FailedPreconditionError
from services.jobs.lease import held_leases
print("ready", flush=True)
sys.stdin.readline()
try:
    with held_leases([sys.argv[1]], "fused"):
        print("holds", flush=True)
        sys.stdin.readline()
except FailedPreconditionError:
    print("refused", flush=True)
"""


def test_of_processes_that_start_together_no_two_hold_the_lease(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
    assert answers.count("holds\n") <= 1 and answers.count("refused\n") >= 2
    for racer in racers:
        racer.communicate("end\n", timeout=60)
    assert claims(tmp_path) == []
