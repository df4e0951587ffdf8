"""Training rows made of what `fusion sample` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.base.errors import SettingError
from services.posttrain.config import DpoStage, SftStage
from services.posttrain.data.judge import Judge
from services.posttrain.data.manifest import StageData, stage_data
from services.posttrain.data.rows import answered_rows, verified_prompts
from services.posttrain.job import StageJob
from tests.posttrain.scene import write_rows


def sampled(source: str, number: int, prompt: list[dict[str, str]], text: str, logprob: float) -> dict[str, Any]:
    """A row as services/sample/answers.py exports it."""
    messages = [*prompt, {"role": "assistant", "content": text}]
    about = {"source": source, "answer": number, "finish_reason": "stop_token", "seed": 1}
    return {"messages": messages, **about, "num_tokens": 4, "logprob": logprob}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    asked = [[{"role": "user", "content": f"What is {n} and {n}?"}] for n in (2, 3, 4)]
    prompts = [
        {"messages": prompt, "verify": {"kind": "answer", "expected": 2 * n}}
        for prompt, n in zip(asked, (2, 3, 4), strict=True)
    ]
    answers = [
        sampled("a", 0, asked[0], "It is 4.", -4.0),
        sampled("a", 1, asked[0], "It is 5.", -1.0),
        sampled("b", 0, asked[0], "Five.", -2.0),
        sampled("a", 0, asked[1], "It is 7.", -2.0),
        sampled("b", 0, asked[1], "6", -8.0),
        sampled("b", 0, asked[2], "It is 8.", -2.0),
        sampled("b", 1, asked[2], "It is 9.", -6.0),
    ]
    return {
        "answers": write_rows(tmp_path / "answers.jsonl", answers),
        "prompts": write_rows(tmp_path / "prompts.jsonl", prompts),
        "held_out": write_rows(tmp_path / "held_out.jsonl", prompts[2:]),
    }


def made(files: dict[str, str], kind: str, **answers: Any) -> StageData:
    model = {"sft": SftStage, "dpo": DpoStage}[kind]
    stage = model.model_validate({"kind": kind, "answers": {"files": [files["answers"]], **answers}})
    held_out = verified_prompts("gate.prompts", [files["held_out"]])
    return stage_data(stage, held_out, overlap_share=0.8, judge=Judge(None))


def test_the_right_answer_of_any_source_becomes_a_row_with_its_provenance(files: dict[str, str]) -> None:
    data = made(files, "sft", prompts=[files["prompts"]])
    found = [(row["completion"], row["source"], row["answer"], row["judge"]) for row in data.rows]
    assert found == [("It is 4.", "a", 0, "verifier"), ("6", "b", 0, "verifier")]
    assert data.held_out == 1, "the third prompt is the gate's"
    assert data.counts == {"a": 1, "b": 1}
    assert data.rows[0]["prompt"] == [{"role": "user", "content": "What is 2 and 2?"}]


def test_pairs_of_one_source_and_of_right_and_wrong(files: dict[str, str]) -> None:
    within = made(files, "dpo", prompts=[files["prompts"]])
    assert [(row["chosen"], row["rejected"], row["source"]) for row in within.rows] == [("It is 4.", "It is 5.", "a")]
    across = made(files, "dpo", prompts=[files["prompts"]], pairs="right_and_wrong")
    assert [(row["source"], row["rejected_source"]) for row in across.rows[1:]] == [("b", "a")]


def test_log_probability_is_a_judge_that_needs_no_spec(files: dict[str, str]) -> None:
    data = made(files, "sft", judge="logprob")
    assert [(row["completion"], row["score"]) for row in data.rows] == [("It is 5.", -0.25), ("It is 7.", -0.5)]
    only_b = made(files, "sft", judge="logprob", sources=["b"], most_rows=1)
    assert {row["source"] for row in only_b.rows} == {"b"}


def test_the_same_answers_in_another_order_are_the_same_rows(files: dict[str, str], tmp_path: Path) -> None:
    lines = Path(files["answers"]).read_text().splitlines()
    by_prompt = sorted(lines[:3], reverse=True) + lines[3:]
    other = {**files, "answers": str(tmp_path / "other.jsonl")}
    Path(other["answers"]).write_text("\n".join(by_prompt) + "\n")
    one, another = (made(given, "dpo", prompts=[files["prompts"]]) for given in (files, other))
    assert one.identity == another.identity


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "line 1: no answer"),
        ({"completion": "a"}, "needs `prompt`"),
        ({"messages": [{"role": "king", "content": "a"}]}, "king"),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    stage = SftStage.model_validate({"kind": "sft", "data": [str(file)]})
    with pytest.raises(SettingError, match=message):
        stage_data(stage, [], overlap_share=0.8, judge=Judge(None))


def test_an_answer_that_was_cut_off_is_no_row(files: dict[str, str]) -> None:
    path = Path(files["answers"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"finish_reason": "length"}) + "\n" for row in rows if row["source"] == "a")
    )
    with pytest.raises(SettingError, match="no row is left to learn from: there are none"):
        made(files, "sft", prompts=[files["prompts"]])


def test_rows_with_odd_ends_of_lines_are_read_back(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "one\u2028two\u0085three"}]
    StageData(rows, 0, {}).write(tmp_path)
    stage = SftStage.model_validate({"kind": "sft", "data": ["x.jsonl"]})
    assert StageJob("1-sft", tmp_path, tmp_path, stage, None, "identity").rows() == rows  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": [], "completion": "x"}, "line 1: prompt: holds no message"),
        ({"prompt": "p", "completion": "\ud83d"}, "line 1: completion: holds half of a surrogate pair"),
    ],
)
def test_rows_that_hold_nothing_to_learn_are_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SettingError, match=problem):
        answered_rows("data", [str(tmp_path / "rows.jsonl")])
