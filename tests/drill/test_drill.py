"""The fault drill in brief: a fault of each kind that is quickly over, and the same judgement as in the long one."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import block_pb2
from services.wire.block import decode_block
from tests.drill.faults import BRIEF
from tests.drill.ledger import Entry, LedgerReader, LedgerWriter, judge
from tests.drill.scene import Scene

SEED = 7
SHORT = ("nan blocks", "kill source", "kill consumer")
"""What `make test` has time for; `make drill` does all that are soon over."""


def entry(epoch: int, index: int, **other: str) -> Entry:
    cursor = {"epoch": epoch, "dealt": 0, "received": index + 1, "plan": "p"}
    return Entry(epoch, index, other.get("digest", f"d{index}"), cursor, 0.0, ["a"], other.get("wrong", ""))


def test_judge_finds_what_is_lost_twice_or_wrong() -> None:
    expected = {index: f"d{index}" for index in range(3)}
    sound = [entry(epoch, index) for epoch in range(2) for index in (2, 0, 1)]
    assert judge(sound, expected).sound
    assert judge(sound[:4] + sound[5:], expected).lost == [(1, 0)]
    assert judge([*sound, sound[2]], expected).twice == [(0, 1)]
    assert len(judge([*sound[:-1], entry(1, 1, digest="d2")], expected).wrong) == 1
    assert len(judge([*sound[:-1], entry(1, 1, wrong="a row sums to 2")], expected).wrong) == 1
    assert not judge(sound, expected, ["computed again, it differs"]).sound
    assert not judge([], expected).sound


def test_ledger_goes_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    reader = LedgerReader(path)
    LedgerWriter(path).append(entry(0, 0))
    with path.open("ab") as file:
        file.write(entry(0, 1).line()[:-9])
    reader.update()
    writer = LedgerWriter(path)
    assert writer.cursor is not None and writer.cursor.received == 1
    writer.append(entry(0, 1))
    reader.update()
    assert reader.entries == [entry(0, 0), entry(0, 1)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("faults", [SHORT, pytest.param(BRIEF, marks=pytest.mark.drill)])
def test_stream_survives_a_fault_of_each_kind(faults: tuple[str, ...], tmp_path: Path) -> None:
    folder, results = tmp_path / "drill", tmp_path / "drill.json"
    command = [sys.executable, "-m", "tests.drill", "--brief", "--faults", *faults, "--seconds", "300"]
    options = ["--seed", str(SEED), "--keep", folder, "--json", results]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(results.read_text())
    assert all(check["ok"] for check in report["checks"])
    recovered = {row["fault"]: row["recovered"] for row in report["rows"] if "fault" in row}
    assert recovered == dict.fromkeys(faults, 1)
    # The judge must be able to say no.
    ledger = LedgerReader(folder / "ledger.jsonl")
    ledger.update()
    sample = next(entry.block for entry in ledger.entries if entry.block)
    block = decode_block(block_pb2.TokenBlock.FromString(base64.b64decode(sample)))
    recomputation = Scene(folder, SEED).recomputation()
    assert recomputation.wrong_with(block) == ""
    flat = np.full_like(block.topk_logprobs_TK, -np.log(2 * block.k))
    assert "differs" in recomputation.wrong_with(replace(block, topk_logprobs_TK=flat))


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seed", "-1"], ["--faults", "flood"], ["--keep", "/tmp"]])
def test_bad_arguments_end_with_2(arguments: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-m", "tests.drill", *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert arguments[0] in ran.stderr
