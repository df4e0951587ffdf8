"""The fault drill in brief: a fault of each kind that is quickly over, and the same judgement as in the long one."""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusion.v1 import block_pb2
from services.common.wire import decode_block
from tests.drill.ledger import Entry, LedgerReader, LedgerWriter, judge
from tests.drill.run import drill
from tests.drill.scene import Scene

FAULTS = (
    "reset client",
    "nan blocks",
    "kill source",
    "other text",
    "reset sources",
    "kill consumer",
    "wrong fingerprint",
    "freeze source",
    "late answers",
    "kill fusion",
    "kill proxy",
)


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
def test_stream_survives_a_fault_of_each_kind(home: Path, tmp_path: Path) -> None:
    del home  # a FUSION_HOME of the tests' own
    with Scene(tmp_path, seed=7, deadline_seconds=1.5, fusion_replicas=1) as scene:
        outcome = drill(scene, 300, random.Random(7), print, faults=FAULTS, num_recomputed=20)
        assert outcome.problems == []
        verdict = outcome.verdict
        assert (verdict.lost, verdict.twice, verdict.wrong) == ([], [], [])
        assert [strike.fault for strike in outcome.strikes] == list(FAULTS)
        assert outcome.num_recomputed == 20
        # The judge must be able to say no.
        sample = next(entry.block for entry in scene.ledger.entries if entry.block)
        block = decode_block(block_pb2.TokenBlock.FromString(base64.b64decode(sample)))
        recomputation = scene.recomputation()
        assert recomputation.wrong_with(block) == ""
        flat = np.full_like(block.topk_logprobs_TK, -np.log(2 * block.k))
        assert "differs" in recomputation.wrong_with(replace(block, topk_logprobs_TK=flat))
