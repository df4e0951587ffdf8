"""`fusion models convert`: both ways, what it prints, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from services.cli.app import app
from tests.fakes.files.tiny_internlm2 import write_checkpoint


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["models", "convert", "internlm2", *map(str, arguments)])


def test_there_and_back(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", shards=2)
    done = convert(original, tmp_path / "llama", "--verify")
    assert done.exit_code == 0, done.output
    weights, logits, ids = done.stdout.splitlines()
    assert weights == f"{tmp_path / 'llama'}: 60,320 weights, with chat template"
    assert logits.startswith("logits differ from the reference by ") and ids == "ids are SentencePiece's"
    done = convert(tmp_path / "llama", tmp_path / "back", "--back")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'back'}: 60,320 weights, with chat template\n"
    assert (tmp_path / "back" / "config.json").read_text() == (original / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "out"), "model folder missing does not exist"),
        (("llama", "out"), "model_type is 'llama', which is no InternLM2"),
        (("original", "llama"), "llama is there already; name a folder that is not"),
        (("original", "out", "--original", "original"), "--original: only with --back"),
        (("original", "out", "--back"), "with --original"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "original")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    done = convert(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
