"""The command line: what a user types wrong ends with exit code 2 and one message naming it; the services go on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from services.cli.app import app
from services.commands.prepare import prepare
from services.evaluation.report.find_runs import find_runs
from services.fusion.config import ServiceConfig
from services.recipes.load import load_recipe, shipped_recipes
from services.recipes.recipe import RecipeError
from tests.fakes.files.small_disk import small_disk
from tests.fakes.live import Live
from tests.fakes.tiny_model import sentences

pytestmark = pytest.mark.timeout(900)

FUSION = str(Path(sys.executable).parent / "fusion")


def fusion(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FUSION, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "200", **env},
    )


@pytest.fixture
def written(recipe_file: Path, tmp_path: Path) -> Any:
    """Writes the recipe of the tests with one dotted key changed, and returns its path."""

    def write(key: str, value: Any) -> str:
        recipe = yaml.safe_load(recipe_file.read_text())
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            section = section[int(parent)] if parent.isdigit() else section.setdefault(parent, {})
        section[last] = value
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


def test_validate_accepts_what_is_good(recipe_file: Path) -> None:
    done = fusion("validate", str(recipe_file))
    assert done.returncode == 0, done.stderr
    assert "2 sources" in done.stdout


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_good(name: str) -> None:
    assert load_recipe(name).name == name


BAD_RECIPES = [
    ("colour", "red", "colour: unknown key"),
    ("fusion.strategy", "best", "fusion.strategy: Input should be 'min_ce', 'avg_ce' or 'fixed'"),
    ("fusion.tau", 0, "fusion.tau: "),
    ("fusion.alignment", "bytes", "fusion.alignment: Input tag 'bytes' found using 'method' does not match"),
    ("fusion.alignment", "transport", "fusion.alignment: transport matches candidates with those of a source"),
    ("fusion.min_sources", 3, "fusion.min_sources: 3 is more than the 2 sources"),
    ("distill.lambda", 1.5, "distill.lambda: Input should be less than or equal to 1"),
    ("sources.1.name", "smollm2", "the name smollm2 is used twice"),
    ("sources.0.model", "/no/such/folder", "sources[0].model: "),
    ("distill.lora", {"rank": 4}, "distill.lora: adapters need a pretrained target (target.model)"),
    ("distill.lambda", -0.1, "distill.lambda: Input should be greater than or equal to 0"),
    ("distill.sources", ["tiny", "gemma"], "distill.sources: no source is called gemma; there are smollm2, tiny"),
    ("sources.0.engine", "tgi", "sources.0.engine: Input should be 'vllm', 'transformers' or 'synthetic'"),
    ("sources.0.top_k", 0, "sources.0.top_k: "),
    ("sources.0.max_top_k", 3, "max_top_k (3) must be at least top_k (16)"),
    ("service.grpc_port", 70000, "service.grpc_port: "),
    ("service.dashboard_port", 12345, "service.dashboard_port: 10002 to 19999 are the ports of Ray's workers"),
    ("corpus.window_bytes", 8192, "corpus.window_bytes: 8192 is more than service.max_text_bytes = 4096"),
    ("target.tokenizer", "/no/such/folder", "target.tokenizer: no folder /no/such/folder"),
    ("fusion", {"strategy": "fixed", "weights": {"tiny": 1}}, "fusion.weights: no weight for source smollm2"),
    pytest.param(
        "distill.device",
        "cuda",
        "distill.device: cuda is asked for, but torch sees no CUDA device",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"),
    ),
    ("distill.k", 17, "distill.k: 17 is more than fusion.k_out = 16"),
    ("corpus.files", ["/no/such/*.txt"], "corpus.files.0: no file matches"),
    ("corpus.name", "../elsewhere", "corpus.name: "),
    ("name", "../elsewhere", "name: "),
    ("distill.prefetch_windows", 2000, "distill.prefetch_windows: 2000 is more than service.per_client.blocks = 1024"),
    ("sources.1.per_client.streams", 0, "sources.1.per_client.streams: "),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_RECIPES)
def test_validate_names_the_key(written: Any, key: str, value: Any, message: str) -> None:
    done = CliRunner().invoke(app, ["validate", written(key, value)], terminal_width=200)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("run_name", ["../elsewhere", "/elsewhere", "..", "a/b", ""])
def test_a_run_stays_in_its_recipe_s_folder(run_name: str, written: Any) -> None:
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
    written: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    recipe = written("output_dir", str(tmp_path / "runs"))
    if "corpus.shared_run_bytes=100" in arguments:  # documents that differ in their last words only
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text(f"{sentences(500, seed=1)}{sentences(50, seed=number)}")
        arguments = [*arguments, "--set", f"corpus.files=[{tmp_path}/*.txt]"]
    command = ["distill", recipe, "--ray-address", "http://127.0.0.1:9", *arguments]
    done = CliRunner().invoke(app, command, terminal_width=200)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert not list(tmp_path.glob("runs/**/submitted.yaml"))


def test_distill_with_nothing_up_says_so_at_once(written: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["distill", written("output_dir", str(tmp_path / "runs")), "--set", "name=idle"])
    assert (done.exit_code, "run `fusion up` first" in done.stderr) == (2, True), done.output
    assert not (tmp_path / "runs").exists()


def test_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for content, message in ((None, "shipped recipes are"), ("{", "not YAML"), ("- a", "expected a mapping")):
        path = tmp_path / "recipe.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_set_changes_a_key_and_refuses_what_is_no_setting(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, {"distill.lambda": 1}).distill.lambda_ == 1
    done = fusion("validate", str(recipe_file), "--set", "distill.lambda")
    assert (done.returncode, "expected KEY=VALUE" in done.stderr) == (2, True)


def test_run_that_differs_from_what_is_up_is_refused(live: Live) -> None:
    done = fusion("distill", str(live.recipe_file), "--set", "fusion.strategy=min_ce", "--run-name", "other")
    assert (done.returncode, "fusion: differs from what is up" in done.stderr) == (2, True)


def test_port_in_use_is_named(written: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fusion("up", written("service.grpc_port", port), "--set", "name=another")
    assert done.returncode == 2
    assert f"service.grpc_port: port {port} is in use" in done.stderr


def test_full_disk_is_named(written: Any, tmp_path: Path) -> None:
    """A file system of 64 KiB that is full: preparing must say so, not leave half a corpus behind."""
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 60 * 1024)
        done = fusion("up", written("output_dir", str(disk)), "--set", "name=full")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "No space left on device" in done.stderr or "no space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(disk.glob("full/corpus/windows.parquet"))


def test_a_service_that_is_not_there_is_named() -> None:
    done = fusion("fetch", "--text", "x", "--address", "127.0.0.1:9")
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_store_lies_in_the_run_folder_unless_told_otherwise(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.fusion_service().service.store == str(recipe.run_folder / "store")
    assert load_recipe(recipe_file, {"service.store": None}).fusion_service().service.store is None
    assert ServiceConfig().store == "store"


def test_status_fetch_and_second_up(live: Live) -> None:
    status = fusion("status")
    assert status.returncode == 0, status.stdout + status.stderr
    for word in ("SERVING", "smollm2", "tiny", live.client.info().vocabulary):
        assert word in status.stdout
    fetched = fusion("fetch", "--text", "The capital of France is", "--top", "3")
    assert fetched.returncode == 0, fetched.stderr
    assert "(next)" in fetched.stdout
    assert "source smollm2: weight" in fetched.stdout
    again = fusion("up", str(live.recipe_file))
    assert (again.returncode, "is up already" in again.stderr) == (2, True)


def test_eval_of_the_recipe_s_own_models_goes_into_its_report(written: Any, tmp_path: Path) -> None:
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


def test_eval_and_report(live: Live) -> None:
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


def test_doctor_and_help() -> None:
    assert "vLLM" in fusion("doctor").stdout
    shown = fusion("--help").stdout
    for command in (
        "models",
        "validate",
        "up",
        "down",
        "status",
        "fetch",
        "backfill",
        "distill",
        "eval",
        "report",
        "doctor",
    ):
        assert command in shown
