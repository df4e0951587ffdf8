"""Prompts from files of both formats, and what is said of rows that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.base.errors import SettingError
from services.sample.prompts import read_prompts
from services.wire.answer import messages_prompt, text_prompt

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ça va?"}]


def test_prompts_of_both_formats_are_the_same(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"prompt": "Once"}, {"messages": TURNS}, {"prompt": "", "about": "kept by nobody"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    rows = [{"prompt": line.get("prompt"), "messages": line.get("messages")} for line in lines]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    expected = [text_prompt("Once"), messages_prompt(TURNS), text_prompt("")]
    assert list(read_prompts([f"{tmp_path}/*"])) == expected * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: no JSON"),
        ("[]", "row 1: needs one of the keys prompt and messages"),
        ({"text": "a"}, "row 1: needs one of the keys"),
        ({"prompt": "a", "messages": TURNS}, "row 1: needs one of the keys"),
        ({"prompt": 1}, "row 1: prompt must be a string"),
        ({"messages": []}, "row 1: messages must be a list"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "row 1: messages.0..role: 'nobody' is none of system"),
        ({"messages": TURNS, "tools": [1]}, "row 1: tools: expected a list of objects"),
        ({"messages": ["a"]}, "row 1: messages must be a list"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "Yes."}]}, "row 1: messages end with the assistant's"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, line: Any, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(SettingError, match=f"^prompts: .*a.jsonl, {problem}"):
        list(read_prompts([f"{tmp_path}/a.jsonl"]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.parquet").write_text("text")
    for pattern, problem in (("*.csv", "no file matches"), ("*.txt", "neither .jsonl nor"), ("*.parquet", "cannot be")):
        with pytest.raises(SettingError, match=f"^prompts: .*{problem}"):
            list(read_prompts([f"{tmp_path}/{pattern}"]))
