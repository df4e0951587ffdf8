"""`fusion cloze` writes a task for every domain of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from services.cli.app import app
from tests.commands.analysis.conftest import write_recipe


def test_the_command_writes_tasks_of_a_split(models: dict[str, Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, models, {}), tmp_path / "tasks"

    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["cloze", recipe, str(out), *options], terminal_width=200)

    done = run("--per-document", "1")
    assert done.exit_code == 0, done.output
    names = {file.stem for file in out.glob("*.yaml")}
    assert names == {"cloze_even", "cloze_odd"} and all(name in done.output for name in names)
    assert run().exit_code == 2 and "is not empty" in run().output
    out = tmp_path / "more"
    unknown = run("--split", "test")
    assert unknown.exit_code == 2 and "--split test: the corpus has train, held_out" in unknown.output
