"""`fusion recall select` and `ask`: the judge here or served, and a served model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.recall.config import RecallConfig
from services.recall.excerpt import GAP, excerpt_of, prompt_of
from services.recall.judge import Judge
from services.recall.selector import KeyBlock
from services.source.config import SourceConfig
from tests.fakes.files.tiny_encoder import write_encoder
from tests.fakes.services.plain_recall import ScriptedJudge, plain_recall
from tests.fakes.services.plain_source import plain_source
from tests.fakes.tiny_model import make_tiny_model

TEXT = "nothing here\nthe key is QXZ 😀\nmore of it\nand QX again\n"


def fusion(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["recall", *arguments], terminal_width=400)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def test_an_excerpt_marks_what_it_leaves_out() -> None:
    text = "aé b c d".encode()
    blocks = [KeyBlock(0, 4, 0.5, 1, 2), KeyBlock(4, 6, 0.5, 1, 1), KeyBlock(8, 9, 0.5, 0, 1)]
    assert excerpt_of(text, blocks) == "aé b ".encode() + GAP + b"d"
    assert prompt_of("é\n".encode(), "Why?") == "é\n\nWhy?"


def test_a_served_judge_finds_the_blocks(file: str) -> None:
    with plain_recall(RecallConfig(), ScriptedJudge()) as address:
        done = fusion("select", file, "--question", "QXZ", "--address", address, "--budget-bytes", "33", "--hops", "1")
    assert done.exit_code == 0, done.output
    assert "bytes 13 to 33, score 1.000, hop 1\nthe key is QXZ 😀" in done.output
    assert "bytes 44 to 57, score 0.667, fills the budget\nand QX again" in done.output
    assert "nothing here" not in done.output


def test_a_judge_reads_here_and_wrong_options_are_named(file: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Judge.load(write_encoder(tmp_path / "encoder"), fresh=True).save(tmp_path / "judge")
    judge = ["--judge", str(tmp_path / "judge")]
    done = fusion("select", file, "--question", "Where is Anna?", *judge, "--budget-bytes", "1000")
    assert done.exit_code == 0, done.output
    assert all(line in done.output for line in TEXT.splitlines())
    for options, message in (
        (["--question", "", *judge], "--question: must not be empty"),
        (["--question", "a", *judge, "--address", "localhost:1"], "--judge: reads the text in this process"),
        (["--question", "a", *judge, "--hops", "3,x"], "--hops.1: "),
        (["--question", "a", *judge, "--budget-bytes", "0"], "--budget-bytes: "),
        (["--question", "a", "--judge", str(tmp_path)], "--judge: model folder"),
        (["--question", "a " * 99, *judge], "do not fit the judge's window"),
    ):
        done = fusion("select", file, *options)
        assert (done.exit_code, message in done.output) == (2, True), done.output


def test_a_source_answers_from_the_blocks(file: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", vocabulary_size=400, seed=1)
    config = SourceConfig(name="one", model=str(model), engine="transformers", torch_threads=1)  # type: ignore[arg-type]
    with plain_source(config) as source, plain_recall(RecallConfig(), ScriptedJudge()) as address:
        recipe = {
            "name": "long",
            "corpus": {"files": ["*.txt"]},
            "sources": [{"name": "one", "model": str(model), "address": source.address}],
            "target": {"model": str(model)},
            "recall": {"address": address, "hops": [1]},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        question = ["--question", "QXZ", "--recipe", str(tmp_path / "recipe.yaml")]
        done = fusion("ask", file, *question, "--budget-bytes", "20", "--max-new-tokens", "5")
        assert done.exit_code == 0, done.output
        assert "the key is QXZ 😀" in done.output
        assert "\nanswer: " in done.output
        wrong = fusion("ask", file, *question, "--source", "two")
        assert (wrong.exit_code, "--source two: there is no such source" in wrong.output) == (2, True)
    done = fusion("ask", file, *question)
    assert (done.exit_code, "error: " in done.output) == (2, True)


def test_without_a_recipe_something_must_be_up(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    done = fusion("select", file, "--question", "a")
    assert (done.exit_code, "--judge or --address: needed unless exactly one recipe is up" in done.output) == (2, True)
    done = fusion("ask", file, "--question", "a")
    assert (done.exit_code, "--recipe: needed unless exactly one recipe is up" in done.output) == (2, True)
