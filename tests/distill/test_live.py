"""A Ray Train job through Ray's job API distils from the live stream; killed half-way it resumes, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
import typer
from ray.job_submission import JobSubmissionClient
from typer.testing import CliRunner

from services.commands.distill import submit_recipe
from services.commands.distill_job import main
from services.corpus.ledger import Corpus
from services.evaluation.controls import Training, training_of
from services.evaluation.nats_per_byte import nats_per_byte
from services.recipes.load import load_recipe
from tests.fakes.live import Live

pytestmark = pytest.mark.timeout(900)

command_line = typer.Typer()
command_line.command()(main)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)
    return value


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def training_processes(run_name: str) -> list[psutil.Process]:
    """The job's driver: the process whose command line names the run."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "services.distill" in (process.info["cmdline"] or []) and run_name in process.info["cmdline"]
    ]


def test_killed_job_resumes_with_no_window_lost_or_repeated(live: Live) -> None:
    recipe, folder = live.recipe, live.recipe.run_folder / "killed"
    code = submit_recipe(recipe, run_name="killed", follow=False, dashboard=live.deployment.dashboard)
    assert code == 0
    # Half-way: a checkpoint lies there and steps after it are under way.
    wait_until(lambda: len(rows(folder / "metrics.jsonl")) >= 7, "the seventh step")
    killed = training_processes("killed")
    assert killed
    for process in killed:
        process.kill()
    steps_before = len(rows(folder / "metrics.jsonl"))
    jobs = JobSubmissionClient(live.deployment.dashboard)
    wait_until(lambda: all(job.status.is_terminal() for job in jobs.list_jobs()), "the end of the job", 60)
    assert [job.status.value for job in jobs.list_jobs()] == ["FAILED"]

    assert submit_recipe(recipe, run_name="killed", dashboard=live.deployment.dashboard) == 0
    ledger = rows(folder / "ledger.jsonl")
    corpus = Corpus.open(recipe.corpus_folder)
    assert len(ledger) > steps_before
    assert [row["step"] for row in ledger] == list(range(1, len(ledger) + 1))
    for epoch in range(recipe.distill.epochs):
        seen = Counter(index for row in ledger if row["epoch"] == epoch for index in row["windows"])
        assert seen == Counter(range(corpus.num_windows("train")))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    prompt = tokenizer("the time of", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    texts = list(corpus.texts("held_out"))
    before = nats_per_byte(recipe.target_folder, texts, device="cpu").mean
    assert nats_per_byte(folder / "model", texts, device="cpu").mean < before


def test_stock_ray_job_submit_runs_the_documented_entrypoint(live: Live) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    """It trains on one source alone: the control."""
    entrypoint = ["python", "-m", "services.distill", "--recipe", str(live.recipe_file), "--run-name", "stock"]
    settings = ["--set", "distill.epochs=1", "--set", "distill.sources=[tiny]"]
    done = subprocess.run(
        [ray, "job", "submit", "--address", live.deployment.dashboard, "--", *entrypoint, *settings],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = live.recipe.run_folder / "stock"
    assert (folder / "model" / "config.json").is_file()
    assert load_recipe(folder / "recipe.yaml").distill.sources == ("tiny",)
    assert all(row["source_weights"] == {"tiny": 1.0} for row in rows(folder / "metrics.jsonl"))
    assert training_of(folder) == Training("single", ("tiny",))


def fusion(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "fusion"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_is_stopped_and_leaves_no_process(live: Live) -> None:
    submit_recipe(live.recipe, run_name="stopped", follow=False, dashboard=live.deployment.dashboard)
    wait_until(lambda: rows(live.recipe.run_folder / "stopped" / "metrics.jsonl"), "the first step")
    done = fusion("distill", str(live.recipe_file), "--run-name", "stopped", "--stop")
    assert (done.returncode, "live-stopped-1: stopped" in done.stdout) == (0, True), done.stdout + done.stderr
    jobs = JobSubmissionClient(live.deployment.dashboard)
    wait_until(lambda: jobs.get_job_status("live-stopped-1").is_terminal(), "the end of the job", 60)
    assert jobs.get_job_status("live-stopped-1").value == "STOPPED"
    wait_until(lambda: not training_processes("stopped"), "the end of its processes", 60)
    again = fusion("distill", str(live.recipe_file), "--run-name", "stopped", "--stop")
    assert (again.returncode, "no run stopped is running" in again.stdout) == (1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_the_cluster_lacks_is_refused_and_forgets_no_checkpoint(live: Live) -> None:
    kept = live.recipe.run_folder / "no-gpu" / "checkpoints" / "step-00000001" / "checkpoint.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"step": 1, "plan": "another", "files": {}}')
    settings = ["--run-name", "no-gpu", "--set", "distill.device=cuda"]
    done = fusion("distill", str(live.recipe_file), *settings, "--start-over")
    assert (done.returncode, "distill.device: cuda is asked for" in done.stdout) == (2, True), done.stdout + done.stderr
    assert kept.exists() and not (live.recipe.run_folder / "no-gpu" / "recipe.yaml").exists()
    again = CliRunner().invoke(command_line, ["--recipe", str(live.recipe_file), *settings])
    assert (again.exit_code, "checkpoint: step-00000001" in again.stderr) == (2, True), again.output
    assert "belongs to another target, data set or training settings" in again.stderr


def test_stream_for_another_target_is_refused_before_training(live: Live, tmp_path: Path) -> None:
    """The run's target folder holds another tokenizer than the service was started with."""
    from tests.fakes.tiny_model import make_tiny_model

    other = live.recipe.model_copy(update={"name": "other", "output_dir": str(tmp_path)})
    make_tiny_model(other.target_folder, vocabulary_size=450, seed=9)
    recipe_file = tmp_path / "other.yaml"
    other.save(recipe_file)
    done = subprocess.run(
        [sys.executable, "-m", "services.distill", "--recipe", str(recipe_file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "vocabulary" in done.stderr
    assert not list(tmp_path.glob("other/fused/checkpoints/*"))
