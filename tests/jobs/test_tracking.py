"""Curves at every tracker are those of `metrics.jsonl`, through kills as well; trackers that fail end no training."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.base.errors import SettingError
from services.jobs.run_folder import RunFolder
from services.jobs.step_log import StepLog, read_rows
from services.jobs.tracking import Trackers, Tracking, config, trackers
from tests.fakes.files.curves import Curves, mlflow_curves, tensorboard_curves, wandb_curves

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for names in config._ENVIRONMENT.values() for name in names]:
        monkeypatch.delenv(name, raising=False)


def curves_of_log(files: RunFolder) -> Curves:
    found: Curves = {}
    for row in read_rows(files.metrics):
        for key, value in row.items():
            if key != "step" and isinstance(value, float):
                found.setdefault(key, {})[row["step"]] = value
    return found


def test_killed_it_goes_on_in_the_same_runs_and_every_step_stands_there_once(tmp_path: Path) -> None:
    """Killed three steps behind its checkpoint."""
    for after_step, last_step, end in ((0, 8, "killed"), (5, 12, "ends")):
        command = [sys.executable, "-m", "tests.jobs.tracked_process", str(tmp_path), str(after_step), str(last_step)]
        done = subprocess.run([*command, end], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    files = RunFolder(tmp_path / "run")
    wanted = curves_of_log(files)
    assert list(wanted["loss"]) == list(range(1, 13)) and list(wanted["accuracy"]) == [3, 6, 9, 12]
    assert wandb_curves(tmp_path / "tracking" / "wandb") == {"story/first": wanted}
    wanted["rate_0_"] = wanted.pop("rate[0]")  # they allow fewer characters
    assert mlflow_curves(tmp_path / "tracking" / "mlflow") == {"story/first": wanted}
    written = tensorboard_curves(files.events)
    assert written == {key: pytest.approx(curve, rel=1e-6) for key, curve in wanted.items()}


class Fickle:
    """A tracker that has some steps already, and fails at one."""

    def __init__(self, has: int = 0, fails_at: int = 10**9) -> None:
        self.last_step, self._fails_at = has, fails_at
        self.steps: list[int] = []
        self.ended: bool | None = None

    def log(self, step: int, figures: object) -> None:
        if step == self._fails_at:
            raise ConnectionError("the server is away")
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.ended = not failed


@pytest.fixture
def files(tmp_path: Path) -> RunFolder:
    log = StepLog(tmp_path / "metrics.jsonl", after_step=0)
    for step in range(1, 9):
        log.write({"step": step, "loss": 0.5})
    log.close()
    return RunFolder(tmp_path)


def test_what_a_tracker_missed_is_filled_in_and_what_it_has_is_left(
    files: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, ahead = Fickle(has=3), Fickle(has=7)
    monkeypatch.setitem(trackers._OPEN, "wandb", lambda *_: behind)
    monkeypatch.setitem(trackers._OPEN, "mlflow", lambda *_: ahead)
    with Trackers(Tracking(("wandb", "mlflow")), "run", files, after_step=5) as each:
        for step in (6, 7, 8, 9):
            each.write({"step": step, "loss": 0.5})
    assert (behind.steps, ahead.steps) == ([4, 5, 6, 7, 8, 9], [8, 9])
    assert behind.ended and ahead.ended


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(
    files: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails, sound = Fickle(fails_at=2), Fickle()
    monkeypatch.setitem(trackers._OPEN, "mlflow", lambda *_: fails)
    monkeypatch.setitem(trackers._OPEN, "wandb", lambda *_: sound)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ArithmeticError),
        Trackers(Tracking(("mlflow", "wandb")), "run", files, after_step=0) as each,
    ):
        for step in (1, 2, 3):
            each.write({"step": step, "loss": 0.5})
        raise ArithmeticError("training has diverged")
    assert (fails.steps, sound.steps, sound.ended) == ([1], [1, 2, 3], False)
    assert "mlflow is left out from step 2 on: the server is away" in caplog.text


def test_a_tracker_that_cannot_be_opened_is_an_error_at_the_start_and_a_warning_later(
    files: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> Fickle:
        raise ConnectionError("no server at https://user:secret@host")

    sound = Fickle()
    monkeypatch.setitem(trackers._OPEN, "wandb", lambda *_: sound)
    monkeypatch.setitem(trackers._OPEN, "mlflow", away)
    both = Tracking(("wandb", "mlflow"))
    with pytest.raises(SettingError, match=r"^tracking: mlflow: no server at https://\*\*\*$"):
        Trackers(both, "run", files, after_step=0)
    assert sound.ended is False
    with Trackers(both, "run", files, after_step=8):
        assert sound.steps == list(range(1, 9))
    assert "mlflow is left out: no server at https://***" in caplog.text and "secret" not in caplog.text


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == "mlflow" else find(name))
    Tracking(("tensorboard", "wandb")).check()
    with pytest.raises(SettingError, match="tracking: mlflow is not installed here; the extra `tracking` has it"):
        Tracking(("tensorboard", "mlflow")).check()


def test_a_submitted_job_gets_the_environment_of_its_trackers_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://host:5000")
    assert Tracking(("wandb",)).environment() == {"WANDB_MODE": "online"}
    assert Tracking(("mlflow",)).environment() == {"MLFLOW_TRACKING_URI": "https://host:5000"}
    assert Tracking().environment() == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host:5000")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI: a https:// URL with credentials") as refused:
        Tracking(("mlflow",)).environment()
    assert "secret" not in str(refused.value)


def test_a_run_that_starts_over_is_another_one(tmp_path: Path) -> None:
    files = RunFolder(tmp_path)
    files.tracked.write_text(json.dumps({"mlflow": "abc"}))
    files.clear()
    assert not files.tracked.exists()
