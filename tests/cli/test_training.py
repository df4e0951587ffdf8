"""`fusion distill`, `eval`, `runs` and `report`: what they refuse, and what they show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.app import app
from services.commands.prepare import prepare
from services.evaluation.report.find_runs import find_runs
from services.recipes.load import load_recipe
from tests.cli.conftest import Fusion, Written
from tests.fakes.live import Live
from tests.fakes.tiny_model import sentences

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("run_name", ["../elsewhere", "/elsewhere", "..", "a/b", ""])
def test_a_run_stays_in_its_recipe_s_folder(run_name: str, written: Written) -> None:
    """Starting over deletes what it finds there."""
    arguments = ["distill", written("name", "live"), "--run-name", run_name, "--start-over"]
    done = CliRunner().invoke(app, arguments, terminal_width=200)
    assert done.exit_code == 2
    assert "--run-name: must match" in done.stderr


BAD_RUNS = [
    (["--set", "distill.lambda=1.5"], "distill.lambda: Input should be less than or equal to 1"),
    (["--set", "corpus.held_out_bytes=3"], "corpus.held_out_bytes: no window fits"),
    (["--set", "corpus.shared_run_bytes=100"], "corpus.shared_run_bytes: every train document shares"),
    (["--set", "distill.sources=[gemma]"], "distill.sources: no source is called gemma"),
    (["--run-name", "target"], "is the recipe's own"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_RUNS)
def test_distill_refuses_before_anything_is_submitted(
    written: Written, tmp_path: Path, arguments: list[str], message: str
) -> None:
    recipe = written("output_dir", str(tmp_path / "runs"))
    if "corpus.shared_run_bytes=100" in arguments:  # documents that differ in their last words only
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text(f"{sentences(500, seed=1)}{sentences(50, seed=number)}")
        arguments = [*arguments, "--set", f"corpus.files=[{tmp_path}/*.txt]"]
    # By another name than what may be up, with which it would be compared first.
    command = ["distill", recipe, "--ray-address", "http://127.0.0.1:9", "--set", "name=idle", *arguments]
    done = CliRunner().invoke(app, command, terminal_width=200)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert not list(tmp_path.glob("runs/**/submitted.yaml"))


def test_distill_with_nothing_up_says_so_at_once(written: Written, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["distill", written("output_dir", str(tmp_path / "runs")), "--set", "name=idle"])
    assert (done.exit_code, "run `fusion up` first" in done.stderr) == (2, True), done.output
    assert not (tmp_path / "runs").exists()


def test_run_that_differs_from_what_is_up_is_refused(fusion: Fusion, live: Live) -> None:
    done = fusion("distill", str(live.recipe_file), "--set", "fusion.strategy=min_ce", "--run-name", "other")
    assert (done.returncode, "fusion.strategy: differs from what is up" in done.stderr) == (2, True), done.stderr


def test_eval_of_the_recipe_s_own_models_goes_into_its_report(fusion: Fusion, written: Written, tmp_path: Path) -> None:
    recipe = load_recipe(written("output_dir", str(tmp_path / "runs")))
    recipe_file = tmp_path / "changed.yaml"
    early = fusion("eval", str(recipe_file))
    assert (early.returncode, "no target and no trained model yet" in early.stderr) == (2, True), early.stderr
    prepare(recipe)
    trained = recipe.run_folder / "fused" / "model"
    shutil.copytree(recipe.target_folder, trained)
    done = fusion("eval", str(recipe_file))
    assert done.returncode == 0, done.stderr
    assert "untouched target" in done.stdout and "fused" in done.stdout
    evaluation = json.loads((recipe.run_folder / "evaluation.json").read_text())
    models = evaluation["domains"]["all"]["models"]
    assert models["fused"]["difference_from"]["untouched target"] == {"value": 0.0, "low": None, "high": None}
    assert fusion("report", str(recipe.run_folder)).returncode == 0
    assert "untouched target" in (recipe.run_folder / "report.html").read_text()
    assert fusion("eval", str(recipe_file), "--split", "nothing").returncode == 2


def test_runs_are_listed_with_what_they_have_reached(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "toy" / "mine"
    run.mkdir(parents=True)
    record = {"total_steps": 40, "git_revision": "0123456789abcdef"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 2.5}\n{"step": 8, "lo')
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "run.json").write_text("{")
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["runs", str(tmp_path / "runs")])
    assert listed.exit_code == 0, listed.output
    [line] = [line for line in listed.output.splitlines() if "mine" in line]
    assert all(part in line for part in ("7/40", "2.5000", "not done", "0123456789ab"))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    [state] = find_runs(tmp_path / "runs")
    assert state.done and state.step == 7
    assert CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")]).exit_code == 2


def test_eval_and_report(fusion: Fusion, live: Live) -> None:
    done = fusion("eval", str(live.recipe_file), str(live.recipe.target_folder))
    assert done.returncode == 0, done.stderr
    assert "nats per byte" in done.stdout
    run = live.recipe.run_folder / "for-report"
    run.mkdir(exist_ok=True)
    (run / "summary.json").write_text(json.dumps({"nats_per_byte": {"clm_only": 2.0, "fused": 2.5}}))
    reported = fusion("report", str(run))
    assert reported.returncode == 0, reported.stderr
    assert "NOT better than CLM only" in (run / "report.md").read_text()
    assert fusion("report", str(live.recipe.run_folder / "nothing")).returncode == 2
