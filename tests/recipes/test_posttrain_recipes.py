"""The recipes `tulu` and `fusechat` fit what examples/skills.py and `fusion sample` write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_core.verify.specs import read_spec
from services.posttrain.chain import read_data
from services.recipes.load import load_recipe
from tests.examples.pages import REPOSITORY


@pytest.fixture
def skills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, str(REPOSITORY / "examples" / "skills.py"), "skills"], check=True)
    return tmp_path / "skills"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(skills: Path, name: str, *sources: str) -> None:
    """Write answers as `fusion sample --to` does: the first one of each source is wrong, the second one right."""
    lines = []
    for source in sources:
        for row in rows(skills / "answered.jsonl"):
            wrong = {**row["messages"][-1], "content": "No idea."}
            for number, answer in enumerate((wrong, row["messages"][-1])):
                about = {"source": source, "answer": number, "finish_reason": "stop_token"}
                lines.append(json.dumps({"messages": [*row["messages"][:-1], answer], **about}) + "\n")
    (skills / name).write_text("".join(lines))


def test_the_answers_are_right_and_nothing_held_out_is_learnt(skills: Path) -> None:
    answered, held_out = rows(skills / "answered.jsonl"), rows(skills / "held_out.jsonl")
    assert all(read_spec(row["verify"]).judge(row["messages"][-1]["content"]).right for row in answered)
    asked = [{row["messages"][1]["content"] for row in of} for of in (answered, held_out)]
    assert len(asked[0]) == len(answered) and len(asked[1]) == len(held_out) and not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("name", "file", "sources", "num_rows"),
    [
        ("tulu", "sampled.jsonl", ["smollm2"], [144, 48, 96]),
        ("fusechat", "answers.jsonl", ["smollm2", "gemma3"], [144, 48]),
    ],
)
def test_every_stage_finds_its_rows(
    skills: Path, name: str, file: str, sources: list[str], num_rows: list[int]
) -> None:
    sampled(skills, file, *sources)
    recipe = load_recipe(name)
    assert [source.name for source in recipe.sources] == sources
    assert recipe.sample is not None and recipe.posttrain is not None
    held_out, data = read_data(recipe.posttrain)
    assert len(held_out.prompts) == 96
    assert [len(of_stage.rows) for of_stage in data] == num_rows
    assert not any(of_stage.held_out for of_stage in data)
