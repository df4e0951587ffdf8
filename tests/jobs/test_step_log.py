"""Logs of a run: a resumed run goes on exactly behind its checkpoint, whatever a killed writer left."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.jobs.step_log import StepLog, last_row, read_rows

LEFT_BEHIND = ["", '{"step": 99, "lo', "\x00\x00\x00", "\n", '{"step": 9', "[1]\n"]


def lines(steps: list[int], width: int) -> str:
    return "".join(json.dumps({"step": step, "windows": [7] * width}) + "\n" for step in steps)


@given(
    num_steps=st.integers(0, 30),
    after_step=st.integers(0, 35),
    width=st.sampled_from([0, 3, 40_000]),
    rest=st.sampled_from(LEFT_BEHIND),
)
def test_rows_behind_the_step_and_torn_lines_are_cut_off(tmp_path_factory, num_steps, after_step, width, rest):
    path = tmp_path_factory.mktemp("logs") / "ledger.jsonl"
    path.write_text(lines(list(range(1, num_steps + 1)), width) + rest)
    log = StepLog(path, after_step=after_step)
    log.write({"step": 1000})
    log.close()
    kept = min(num_steps, after_step)
    assert [row["step"] for row in read_rows(path)] == [*range(1, kept + 1), 1000]
    assert path.read_text() == lines(list(range(1, kept + 1)), width) + '{"step": 1000}\n'
    assert last_row(path) == {"step": 1000}


def test_the_last_row_is_the_last_whole_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    path.write_text("")
    assert last_row(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert last_row(path) == {"step": 2}


@pytest.mark.parametrize("num_steps", [2_000, 20_000])
def test_resuming_behind_a_late_step_reads_the_end_of_the_file_only(tmp_path: Path, num_steps: int):
    """A ledger of 20,000 steps of 128 windows has 15 MB; what is read of it does not grow with it."""
    path = tmp_path / "ledger.jsonl"
    with path.open("w") as stream:
        for step in range(1, num_steps + 1):
            stream.write(json.dumps({"epoch": 0, "step": step, "windows": list(range(128)), "skipped": []}) + "\n")
    tracemalloc.start()
    StepLog(path, after_step=num_steps - 50).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert last_row(path)["step"] == num_steps - 50  # type: ignore[index]
