"""`fusion view` on two real sources: texts of one's own and windows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.corpus.ledger import Corpus
from services.recipes.load import load_recipe
from tests.commands.analysis.conftest import write_recipe
from tests.web.test_token_page import HOSTILE, Reader


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["view", *arguments], terminal_width=200)


@pytest.fixture
def recipe(models: dict[str, Path], addresses: dict[str, str], tmp_path: Path) -> str:
    return write_recipe(tmp_path, models, addresses)


def test_a_text_of_one_s_own_and_a_window(recipe: str, tmp_path: Path) -> None:
    page, file = tmp_path / "page.html", tmp_path / "text.txt"
    file.write_text(HOSTILE, encoding="utf-8")
    done = run(recipe, "--html", str(page), "--file", str(file))
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].endswith("page.html")
    assert [tag for tag, _ in Reader(page.read_text()).tags].count("script") == 2

    done = run(recipe, "--html", str(page), "--window", "3", "--against", "fixed", "--top", "2")
    assert done.exit_code == 0, done.output
    read = Reader(page.read_text())
    corpus = Corpus.open(load_recipe(recipe).corpus_folder)
    text = corpus.window("held_out", 3).text.decode()
    assert "".join(read.tokens).replace("⏎\n", "\n").startswith(text)
    assert "fixed small 1, large 1" in page.read_text() and "window 3 of held_out" in read.title

    done = run(recipe, "--html", str(page), "--window", "3", "--against", "online", "--set", "fusion.scope=span")
    assert done.exit_code == 0, done.output
    names = [strategy["name"] for strategy in json.loads(Reader(page.read_text()).data)["strategies"]]
    assert names == ["avg_ce by span", "online"]


def test_mistakes_name_the_option(recipe: str, models: dict[str, Path], tmp_path: Path) -> None:
    page, latin = str(tmp_path / "page.html"), tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for options, message in (
        (("--window", "9999"), "--window 9999: split held_out has windows 0 to"),
        (("--split", "test"), "--split test: the corpus has train, held_out"),
        (("--text", ""), "--text, --file: must not be empty"),
        (("--file", str(latin)), "--text, --file: must be UTF-8, byte 3 is not"),
        (("--text", "x" * 100_000), "service.max_text_bytes allows"),
        (("--text", "a", "--file", str(latin)), "--text, --file: give one of them"),
        (("--port", "8765"), "--port: not with --html"),
    ):
        done = run(recipe, "--html", page, *options)
        assert done.exit_code == 2 and message in done.output, done.output
    gone = run(write_recipe(tmp_path, models, {}), "--html", page, "--text", "of one's own")
    assert gone.exit_code == 2 and "`fusion up` starts the sources" in gone.output
    assert not Path(page).exists()
