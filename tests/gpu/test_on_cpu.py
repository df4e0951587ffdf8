"""The GPU check in brief, on the CPU: every part runs, and what does not depend on a GPU's speed keeps its bound."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.bench.parts.report import Report
from tests.gpu.__main__ import PARTS


@pytest.mark.parametrize("part", [part for part in PARTS if part != "step"])  # a time, and no test asserts one
def test_part(part: str) -> None:
    report = Report("gpu")
    importlib.import_module(f"tests.gpu.{part}").check(report, torch.device("cpu"), quick=True)
    assert report.checks and [check for check in report.checks if not check.ok] == []
