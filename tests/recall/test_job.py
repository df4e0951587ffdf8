"""Training a judge as a job: what it learns, a killed run that goes on as if nothing had happened, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from fusion_core.recall.memory import MemoryConfig
from services.base.errors import FailedPreconditionError, SettingError
from services.jobs.step_log import read_rows
from services.jobs.tracking import Tracking
from services.recall.evaluate import by_memory
from services.recall.examples import gold_blocks
from services.recall.job import JudgeJob, run
from services.recall.judge import Judge
from services.recall.selector import longest_block
from services.recall.train import JudgeTrainer
from services.recall.training_config import JudgeTrainingConfig
from tests.fakes.files.curves import mlflow_curves, tensorboard_curves
from tests.fakes.files.tiny_encoder import write_encoder
from tests.recall.questions import example


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JudgeTrainingConfig:
    folder = tmp_path_factory.mktemp("training")
    write_encoder(folder / "encoder")
    (folder / "train.jsonl").write_text("".join(example(seed).model_dump_json() + "\n" for seed in range(40)))
    return JudgeTrainingConfig(
        files=(str(folder / "train.jsonl"),), encoder=str(folder / "encoder"), steps=60, batch_windows=8,
        block_tokens=8, window_tokens=64, learning_rate=5e-3, checkpoint_every_steps=20, num_workers=0, torch_threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: JudgeTrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> JudgeJob:
    job = JudgeJob("judge", tmp_path_factory.mktemp("run"), config)
    assert run(job)
    return job


def test_a_trained_judge_finds_what_it_was_shown_in_new_texts(trained: JudgeJob) -> None:
    judge = Judge.load(trained.files.model)
    assert (judge.block_tokens, longest_block(judge)) == (8, 8), "blocks are as long as in training, wherever it serves"
    find, right = by_memory(judge, MemoryConfig(window_tokens=64, hops=(1,))), 0
    for seed in range(100, 120):
        new = example(seed)
        document = judge.read(new.text, 8)
        right += find(new.question, document, 1) == gold_blocks(new, document.spans)
    assert right >= 18  # one block in ten by chance
    losses = [row["loss"] for row in read_rows(trained.files.metrics)]
    assert len(losses) == 60 and sum(losses[-10:]) < sum(losses[:10]) / 2


def test_a_run_that_broke_off_goes_on_to_the_same_weights(
    trained: JudgeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = Tracking(("tensorboard", "mlflow"), "toy", tmp_path / "tracking")
    job, step = JudgeJob("judge", tmp_path / "run", trained.config, tracking=tracking), JudgeTrainer.step

    def breaks(self: JudgeTrainer) -> object:
        if self.steps == 27:
            raise OSError("the machine is gone")
        return step(self)

    monkeypatch.setattr(JudgeTrainer, "step", breaks)
    with pytest.raises(OSError, match="the machine is gone"):
        run(job)
    monkeypatch.setattr(JudgeTrainer, "step", step)
    assert run(job)
    rows = read_rows(job.files.metrics)
    assert [row["step"] for row in rows] == list(range(1, 61))
    curves = mlflow_curves(tmp_path / "tracking" / "mlflow")["toy/recall/judge"]
    wanted = {key: {row["step"]: row[key] for row in rows} for key in rows[0] if key not in {"step", "seconds"}}
    assert {key: curves[key] for key in wanted} == wanted  # the seconds of a step taken again are others
    assert tensorboard_curves(job.files.events)["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    whole, resumed = (Judge.load(each.files.model).model.state_dict() for each in (trained, job))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(folder.name for folder in job.files.checkpoints.iterdir()) == ["step-00000040", "step-00000060"]
    assert not run(job)  # it has ended


def test_another_run_under_the_same_name_is_refused(trained: JudgeJob) -> None:
    other = trained.config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(FailedPreconditionError, match=r"recall.train.learning_rate: run judge was started with 0.005"):
        run(JudgeJob("judge", trained.run_folder, other))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: no JSON object"),
        ('{"text": "a"}', "line 1: question: Field required"),
        ('{"text": "abc", "question": "b", "spans": [[2, 9]]}', r"\[2, 9\] is no span of a text of 3 characters"),
        ("", "no example in"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    config: JudgeTrainingConfig, tmp_path: Path, line: str, problem: str
) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n" if line else "")
    job = JudgeJob("judge", tmp_path / "run", config.model_copy(update={"files": (str(tmp_path / "x.jsonl"),)}))
    with pytest.raises(SettingError, match=rf"recall.train.files: .*{problem}"):
        run(job)


@pytest.mark.drill
def test_a_worker_of_ray_train_comes_to_the_same_weights(
    trained: JudgeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from services.deploy.local_ray import enable_ray_authentication

    monkeypatch.setenv("FUSION_HOME", str(tmp_path / "home"))
    enable_ray_authentication()
    job = JudgeJob("judge", tmp_path / "run", trained.config.model_copy(update={"num_workers": 1}))
    try:
        assert run(job)
        assert not run(job)
    finally:
        ray.shutdown()
    here, there = (Judge.load(each.files.model).model.state_dict() for each in (trained, job))
    assert all(torch.equal(here[name], there[name]) for name in here)
