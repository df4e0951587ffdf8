"""`fusion verify`: specs of rows, of prompts and of the command line; here and at a verifier that is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.verify.config import VerifyConfig
from tests.fakes.services.plain_verifier import plain_verifier
from tests.verify.sandbox.hacks import TESTS
from tests.verify.sandbox.test_hacks import HONEST, sandbox_of

QUESTION = [{"role": "user", "content": "Name a colour."}]
SHORT = {"kind": "constraints", "constraints": [{"name": "words", "at_most": 3}, {"name": "no_commas"}]}
PROMPTS = [
    {"prompt": "7 * 6 =", "verify": {"kind": "answer", "expected": 42}},
    {"messages": QUESTION, "verify": SHORT},
    {"prompt": "not judged"},
]
ANSWERS = [
    {"prompt": "7 * 6 =", "completion": " 42, of course", "source": "a"},
    {"prompt": "7 * 6 =", "completion": " 41", "source": "b"},
    {"messages": [*QUESTION, {"role": "assistant", "content": "Red."}], "source": "a"},
    {"messages": [*QUESTION, {"role": "assistant", "content": "Red, blue"}], "source": "b"},
    {"prompt": "its own", "completion": "{}", "source": "a", "verify": {"kind": "json_schema", "schema": True}},
]
RIGHT = [True, False, True, False, True]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def fusion(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments], terminal_width=400)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "answers.jsonl", ANSWERS), "--against", write(tmp_path / "prompts.jsonl", PROMPTS)]


def table_rows(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_prompt_with_two_specs_is_refused(files: list[str], tmp_path: Path) -> None:
    again = [{"prompt": "7 * 6 =", "verify": {"kind": "answer", "expected": 42}}]
    assert fusion(*files, "--against", write(tmp_path / "again.jsonl", again)).exit_code == 0
    other = [*again, {"prompt": "7 * 6 =", "verify": {"kind": "answer", "expected": 43}}]
    done = fusion(*files, "--against", write(tmp_path / "other.jsonl", other))
    assert done.exit_code == 2
    assert "other.jsonl, line 2: verify: its prompt has another spec already" in done.output


def test_answers_are_judged_by_the_specs_of_their_prompts(files: list[str], tmp_path: Path) -> None:
    done = fusion(*files, "--to", str(tmp_path / "judged.jsonl"))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row.pop("verdict")["right"] for row in rows] == RIGHT
    assert rows == ANSWERS
    assert table_rows(done.output) == [
        ["a", "answer", "1", "1", "1.000", "1.000"],
        ["a", "constraints", "1", "1", "1.000", "1.000"],
        ["a", "json_schema", "1", "1", "1.000", "1.000"],
        ["b", "answer", "1", "0", "0.000", "0.000"],
        ["b", "constraints", "1", "0", "0.000", "0.500"],
    ]


def test_a_served_verifier_gives_the_same_verdicts(files: list[str], tmp_path: Path) -> None:
    here, there = str(tmp_path / "here.jsonl"), str(tmp_path / "there.jsonl")
    with plain_verifier(VerifyConfig(bwrap="/nowhere/bwrap")) as address:
        assert fusion(*files, "--to", there, "--address", address).exit_code == 0
    assert fusion(*files, "--to", here).exit_code == 0
    assert Path(here).read_bytes() == Path(there).read_bytes()


def test_programs_are_run_in_the_sandbox_or_not_at_all(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": code} for code in (HONEST, "import os\nos._exit(0)")]
    spec = json.dumps({"kind": "program", "functions": ["add"], "tests": TESTS})
    answers = write(tmp_path / "answers.jsonl", rows)
    refused = fusion(answers, "--spec", spec, "--bwrap", "/nowhere/bwrap", "--to", str(tmp_path / "x.jsonl"))
    assert (refused.exit_code, "apt-get install bubblewrap" in refused.output) == (2, True)
    assert not (tmp_path / "x.jsonl").exists()
    done = fusion(answers, "--spec", spec, "--bwrap", str(sandbox_of(seconds=60)._bubblewrap))
    assert done.exit_code == 0, done.output
    assert table_rows(done.output) == [["", "program", "2", "1", "0.500", "0.500"]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "x", "completion": "y"}], [], "line 1: no spec"),
        ([{"prompt": "x"}], ["--spec", '{"kind": "answer", "expected": "1"}'], "line 1: no answer"),
        ([{"messages": QUESTION, "verify": SHORT}], [], "line 1: no answer"),
        ([{"prompt": "x", "completion": "y", "verify": {"kind": "z"}}], [], "line 1: verify.kind: 'z' is none of"),
        ([3], [], "line 1: expected an object"),
        ([{"prompt": "x", "completion": "y"}], ["--spec", "{"], "--spec: not JSON"),
        ([{"prompt": "x", "completion": "y"}], ["--against", "/nowhere/*.jsonl"], "/nowhere/*.jsonl"),
    ],
)
def test_a_mistake_is_named(rows: list[Any], options: list[str], message: str, tmp_path: Path) -> None:
    done = fusion(write(tmp_path / "answers.jsonl", rows), *options)
    assert (done.exit_code, message in done.output.replace("\n", " ")) == (2, True), done.output
