"""The frame of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.parts import report as module
from tests.bench.parts.report import Report, kept


def test_a_part_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measure(report: Report) -> None:
        calls.append(report.name)
        report.row(table="speed", tokens=7)
        report.check("tokens", 7, "tokens", at_least=5, at_most=6)

    parts = [kept("some", tmp_path / "parts" / "speed.json", measure) for _ in range(2)]
    assert calls == ["some"]
    assert parts[0] == parts[1]
    assert parts[1].rows == [{"table": "speed", "tokens": 7}]
    assert [(check.bound, check.ok) for check in parts[1].checks] == [("at least 5 and at most 6", False)]
    assert "remove it" not in capsys.readouterr().err
    monkeypatch.setattr(module, "git_revision", lambda: "another")
    kept("some", tmp_path / "parts" / "speed.json", measure)
    assert calls == ["some"] and "speed.json: measured at" in capsys.readouterr().err
