"""The job on Ray Train: two workers on gloo, one of which is killed, against one undisturbed worker without Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import pytest
import ray
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from services.base.errors import FailedPreconditionError, UnavailableError
from services.distill.driver import run, work
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.fusion.client import FusedWindow, StreamRequest
from services.jobs.step_log import read_rows
from services.jobs.storage import mend_snapshot, newest_complete
from services.jobs.tracking import Tracking
from tests.fakes.files.curves import tensorboard_curves, wandb_curves
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train, weights

ROOT = Path(__file__).parents[2]


class DeadlyFusion(FakeFusion):
    """Kills the worker of rank 1, once, at a random window; leaves a note that says at which."""

    def __init__(self, tokenizer: Path, texts: list[bytes], note: Path) -> None:
        super().__init__(tokenizer, texts)
        self.note = note

    def stream(self, request: StreamRequest, *, prefetch_windows: int = 32) -> Iterator[FusedWindow]:
        last = random.SystemRandom().randrange(1, 17)
        for number, window in enumerate(super().stream(request, prefetch_windows=prefetch_windows)):
            if request.rank == 1 and number == last and not self.note.exists():
                self.note.write_text(str(window.cursor))
                os.kill(os.getpid(), signal.SIGKILL)
            yield window


def open_deadly(tokenizer: Path, note: Path, _job: DistillJob) -> DeadlyFusion:
    return DeadlyFusion(tokenizer, corpus(18), note)


class ShelfFileSystem(DirFileSystem):
    """A protocol that pyarrow does not know, and that every process reads from the same disk."""

    protocol = "shelf"

    def __init__(self, **settings: object) -> None:
        super().__init__("/", LocalFileSystem(auto_mkdir=True), **settings)


HOLDER = """
import sys
from services.jobs.lease import held_leases
with held_leases(sys.argv[1:], "run"):
    print("holds", flush=True)
    sys.stdin.readline()
"""


def open_fake(tokenizer: Path, _job: DistillJob) -> FakeFusion:
    return FakeFusion(tokenizer, corpus(18))


@pytest.fixture(scope="module")
def _ray():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_ray")
def test_two_workers_one_killed_end_where_one_undisturbed_worker_ends(tmp_path, target):
    torch.set_num_threads(1)
    alone = job_in(tmp_path / "alone", target)
    train(alone, FakeFusion(target, corpus(18)))

    store = tmp_path / "store"
    job = job_in(
        tmp_path / "together", target, num_workers=2, keep_checkpoints=2, torch_threads=1, storage=f"file://{store}"
    )
    job = replace(job, tracking=Tracking(("tensorboard", "wandb"), "toy", tmp_path / "tracking"))
    run(job, open_client=partial(open_deadly, target, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert read_rows(job.files.ledger) == read_rows(alone.files.ledger)
    ours, theirs = read_rows(job.files.metrics), read_rows(alone.files.metrics)
    for key in ("loss", "clm", "fusion", "gradient_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], abs=1e-4)
    for key in ("tokens", "windows", "total_tokens", "total_windows", "masked_share", "covered_mass", "epoch"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs])
    trained = weights(job.files.model)
    for name, weight in weights(alone.files.model).items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-4)
    curves = wandb_curves(tmp_path / "tracking" / "wandb")["toy/run"]
    for key in ("loss", "clm", "fusion", "learning_rate", "tokens_per_second"):
        assert curves[key] == {row["step"]: row[key] for row in ours}
    assert curves["source_weight/left"] == {row["step"]: row["source_weights"]["left"] for row in ours}
    events = tensorboard_curves(job.files.events)
    assert events == {key: pytest.approx(curve, rel=1e-6) for key, curve in curves.items()}
    kept = sorted(
        folder.name for folder in (store / tmp_path.name / "run" / "checkpoints").iterdir() if folder.is_dir()
    )
    assert kept == ["step-00000009", "step-00000010"]


@pytest.mark.drill
@pytest.mark.usefixtures("_ray")
def test_checkpoints_at_a_url_that_only_fsspec_knows(tmp_path, target):
    fsspec.register_implementation("shelf", ShelfFileSystem, clobber=True)
    job = job_in(tmp_path / "toy" / "run", target, epochs=1, torch_threads=1, storage=f"shelf://{tmp_path}/store")
    run(job, open_client=partial(open_fake, target))
    assert newest_complete(job.checkpoints) == newest_complete(tmp_path / "store" / "toy" / "run" / "checkpoints") or (
        newest_complete(job.checkpoints).step == 5  # type: ignore[union-attr]
    )
    rows = read_rows(job.files.metrics)
    run(job, open_client=partial(open_fake, target))
    assert read_rows(job.files.metrics) == rows, "gone on from the last step, of which none is left"


def test_a_run_that_another_process_trains_is_refused_and_not_forgotten(tmp_path, target):
    job = job_in(tmp_path, target, epochs=1)
    train(job, FakeFusion(target, corpus(18)))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *job.lease_locations], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
    for start_over in (False, True):
        with pytest.raises(FailedPreconditionError, match=f"process {holder.pid} on .* trains it since"):
            run(job, start_over=start_over, open_client=partial(open_fake, target))
    assert newest_complete(job.checkpoints) is not None and job.files.metrics.exists()
    assert not job.files.record.exists()
    holder.communicate("end\n", timeout=60)


def test_what_another_attempt_would_only_meet_again_is_no_failure_of_the_worker(tmp_path, target):
    """Ray restarts workers that raise. (With no workers Ray Train calls the function in this process.)"""
    client = partial(open_fake, target)
    job = job_in(tmp_path, target, learning_rate=1e30, clip_norm=None)
    worker = partial(work, job, make_plan(job, client(job)), client, None)
    error = TorchTrainer(worker, scaling_config=ScalingConfig(num_workers=0)).fit().return_value
    assert isinstance(error, ArithmeticError)
    assert "training has diverged" in str(error)


@pytest.mark.usefixtures("_ray")
def test_what_the_cluster_cannot_do_is_refused_at_once(tmp_path, target):
    client = partial(open_fake, target)
    with pytest.raises(UnavailableError, match="a worker needs 5 CPU, the Ray cluster has 2"):
        run(job_in(tmp_path / "a", target, cpus_per_worker=5), open_client=client)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"distill\.device: cuda is asked for"):
            run(job_in(tmp_path / "b", target, device="cuda"), open_client=client)


def test_a_service_for_another_target_is_refused_before_ray_starts(tmp_path, target):
    fusion = FakeFusion(target, corpus(3))
    fusion.vocabulary.fingerprint = "feedfeedfeedfeed"
    with pytest.raises(FailedPreconditionError, match="fuses into feedfeedfeedfeed"):
        run(job_in(tmp_path, target), open_client=lambda _job: fusion)
    assert not (tmp_path / "run.json").exists()


def test_a_list_of_checkpoints_that_a_kill_has_cut_off_is_set_aside(tmp_path, target):
    job = job_in(tmp_path, target, epochs=1)
    assert mend_snapshot(job.files.checkpoints) is None
    train(job, FakeFusion(target, corpus(18)))
    newest = mend_snapshot(job.files.checkpoints)
    assert newest is not None and newest.name == "step-5", "Ray knows of none"
    snapshot = job.files.checkpoints / "checkpoint_manager_snapshot.json"
    whole = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "step-3"}]})
    snapshot.write_text(whole)
    assert mend_snapshot(job.files.checkpoints) is None, "Ray knows"
    for damaged in (whole[:30], "", whole.replace("step-3", "step-4")):
        snapshot.write_text(damaged)
        assert mend_snapshot(job.files.checkpoints) == newest
        assert not snapshot.exists()
