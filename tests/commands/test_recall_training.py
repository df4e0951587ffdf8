"""`fusion recall train` and `eval` in this process: a judge that is better than chance, and mistakes by their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.recall.judge import Judge
from tests.fakes.files.tiny_encoder import write_encoder
from tests.recall.questions import example


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    write_encoder(tmp_path / "encoder")
    for name, seeds in (("train", range(40)), ("other", range(100, 120))):
        (tmp_path / f"{name}.jsonl").write_text("".join(example(seed).model_dump_json() + "\n" for seed in seeds))
    (tmp_path / "text.txt").write_text("a text\n")
    content = {
        "name": "mine",
        "corpus": {"name": "corpus", "files": ["text.txt"]},
        "sources": [{"name": "source", "engine": "synthetic", "model": "encoder"}],
        "target": {"model": "encoder"},
        "recall": {
            "hops": [1],
            "train": {
                "files": ["train.jsonl"], "held_out": ["other.jsonl"], "encoder": "encoder", "num_workers": 0,
                "steps": 60, "batch_windows": 8, "block_tokens": 8, "window_tokens": 64, "learning_rate": 5e-3,
            },
        },
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "mine.yaml"


def fusion(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["recall", *arguments], terminal_width=400)


def test_a_judge_is_trained_once_and_compared(recipe: Path) -> None:
    done = fusion("train", str(recipe))
    assert done.exit_code == 0, done.output
    folder = recipe.parent / "runs" / "mine" / "recall" / "trained"
    assert f"the judge is in {folder / 'model'}" in done.output
    assert Judge.load(folder / "model").window_tokens == 64
    assert "trained already" in fusion("train", str(recipe)).output
    done = fusion("eval", str(recipe), "--blocks", "1")
    assert done.exit_code == 0, done.output
    shares = {share["way"]: share["share"] for share in yaml.safe_load((folder / "evaluation.json").read_text())}
    assert shares["judge"] >= 0.9
    assert shares["BM25"] == 1.0  # the name stands in the question
    assert shares["random"] < 0.4 and shares["head"] < 0.4
    assert all(
        share["low"] <= share["share"] <= share["high"]
        for share in yaml.safe_load((folder / "evaluation.json").read_text())
    )


def test_mistakes_are_named(recipe: Path) -> None:
    for command, settings, problem in (
        ("train", ("recall.train.files=[nothing.jsonl]",), "recall.train.files: nothing.jsonl cannot be read"),
        ("train", ("recall.train.encoder=nowhere",), "recall.train.encoder: model folder nowhere does not exist"),
        ("train", ("recall.train=null",), "recall.train: the recipe has no such section"),
        ("train", ("recall.train.num_workers=1",), "--ray-address: needed, because mine is not up here"),
        (
            "train",
            ("recall.train.window_tokens=16", "recall.train.block_tokens=16"),
            "recall.train.window_tokens: no example has a relevant block",
        ),
        (
            "train",
            ("recall.train.window_tokens=65",),
            "recall.train.window_tokens: must be at most 64 with this encoder",
        ),
        ("eval", (), "--run-name: there is no judge in"),
    ):
        done = fusion(command, str(recipe), *(word for setting in settings for word in ("--set", setting)))
        assert done.exit_code == 2, done.output
        assert problem in done.output
    assert "--run-name: must match" in fusion("train", str(recipe), "--run-name", "../x").output
