"""Workers on gloo: whole models (DDP) and shards (FSDP2) learn the same and share checkpoints, in any number."""

from __future__ import annotations

import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from services.base.errors import FailedPreconditionError
from services.distill.job import DistillJob
from services.distill.plan import make_plan
from services.distill.target.trained import TrainedTarget
from services.distill.workers.parallel import parallelise
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, keeping, run_workers, train, weights

CHANGES: dict[str, object] = {"micro_batch_windows": 1, "eval_every_steps": 5}


def attempt(
    job: DistillJob,
    target_folder: Path,
    rank: int,
    *,
    break_after: int | None = None,
    die_at: int | None = None,
    block_windows: int = 1,
) -> None:
    """One attempt of the workers, which a broken stream may end.

    At step `die_at` the worker of rank 1 is killed when the others have put down their parts of the checkpoint.
    """
    texts, held_out = corpus(18), corpus(5, seed=9)
    fusion = FakeFusion(target_folder, texts, held_out=held_out, break_after=break_after, block_windows=block_windows)
    parallel = partial(parallelise, kind=job.config.parallel, device=torch.device("cpu"))
    world = World(rank=rank, size=dist.get_world_size(), parallel=parallel)
    newest = newest_complete(job.checkpoints)
    dist.barrier()
    restore_from = None if newest is None else job.files.checkpoints / newest.name
    keep_part = keeping(job)

    def keep(metrics: dict, folder: Path, step: int) -> None:
        if step == die_at and rank == 1:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        keep_part(metrics, folder, step)
        dist.barrier()

    worker = DistillWorker(job, make_plan(job, fusion), fusion, world, restore_from=restore_from, keep_checkpoint=keep)
    try:
        worker.run()
    except FailedPreconditionError:
        assert break_after is not None
    dist.barrier()


def in_turns(rank: int, target_folder: Path, folder: Path) -> None:
    turns = job_in(folder / "turns", target_folder, num_workers=2, **CHANGES)
    sharded = job_in(folder / "turns", target_folder, num_workers=2, parallel="fsdp", **CHANGES)
    # A step takes two windows of each worker, a checkpoint is made every third one: DDP up to step 3, FSDP up to 6.
    attempt(turns, target_folder, rank, break_after=7)
    attempt(sharded, target_folder, rank, break_after=7)
    attempt(turns, target_folder, rank)
    attempt(job_in(folder / "growing", target_folder, num_workers=2), target_folder, rank, break_after=7)
    # Adapters of rank 1: of some matrices one worker has nothing.
    lora = job_in(folder / "lora", target_folder, num_workers=2, parallel="fsdp", lora={"rank": 1})
    attempt(lora, target_folder, rank, break_after=7)
    attempt(lora, target_folder, rank)


def sharded_attempt(rank: int, target_folder: Path, folder: Path, die_at: int | None) -> None:
    attempt(job_in(folder, target_folder, num_workers=2, parallel="fsdp"), target_folder, rank, die_at=die_at)


def in_blocks(rank: int, target_folder: Path, folder: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        job = job_in(folder / parallel, target_folder, num_workers=2, parallel=parallel)
        attempt(job, target_folder, rank, block_windows=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("parallel")
    # One worker up to step 3, two up to step 6, and one to the end.
    growing = job_in(folder / "growing", target)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(growing, FakeFusion(target, corpus(18), break_after=15))
    assert run_workers(in_turns, target, folder, num_workers=2, meeting=folder / "turns.gloo") == [0, 0]
    train(growing, FakeFusion(target, corpus(18)))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, target):
    """One worker that nothing disturbs."""
    job = job_in(tmp_path_factory.mktemp("alone"), target)
    train(job, FakeFusion(target, corpus(18)))
    return job


@pytest.fixture(scope="module")
def killed(tmp_path_factory, target):
    """Two workers with sharded weights, one of which was killed in the middle of the checkpoint of step 6."""
    folder = tmp_path_factory.mktemp("killed")
    codes = run_workers(sharded_attempt, target, folder, 6, num_workers=2, meeting=folder / "killed.gloo")
    assert codes == [1, -signal.SIGKILL]
    return job_in(folder, target)


def same(ours: DistillJob, theirs: DistillJob) -> None:
    """Same windows in every step, and the same run within 1e-4."""
    assert read_rows(ours.files.ledger) == read_rows(theirs.files.ledger)
    mine, reference = read_rows(ours.files.metrics), read_rows(theirs.files.metrics)
    for key in ("loss", "clm", "fusion", "gradient_norm"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in reference], abs=1e-4)
    trained_weights = weights(ours.files.model)
    for name, weight in weights(theirs.files.model).items():
        torch.testing.assert_close(trained_weights[name], weight, rtol=0, atol=1e-4)


def moments(checkpoint: Path) -> list[dict[str, list[int]]]:
    """Shapes of the moments in the file of every worker of a checkpoint, by name, in order of rank."""
    found = []
    for file in sorted(checkpoint.glob("optimizer-*/*.safetensors")):
        with safe_open(file, "pt") as shard:
            keys = [key for key in shard.keys() if "exp_avg" in key]  # noqa: SIM118
            found.append({key: shard.get_slice(key).get_shape() for key in keys})
    return found


def num_elements(shapes: dict[str, list[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


def test_from_ddp_to_fsdp_and_back_like_one_undisturbed_worker(tmp_path, target, trained):
    alone = job_in(tmp_path, target, eval_every_steps=5)
    train(alone, FakeFusion(target, corpus(18), held_out=corpus(5, seed=9)))
    turns = job_in(trained / "turns", target)
    same(turns, alone)
    assert len(read_rows(turns.files.ledger)) == 10
    ours, theirs = read_rows(turns.files.evaluations), read_rows(alone.files.evaluations)
    assert [row["nats_per_byte"] for row in ours] == pytest.approx([row["nats_per_byte"] for row in theirs], abs=1e-5)


def test_a_worker_writes_its_own_shard_of_the_optimizer_and_no_other(killed, target):
    """FSDP2 gives every worker its chunk of the rows of every matrix."""
    parameters = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
    chunks = {name: weight.chunk(2) for name, weight in parameters.items()}
    for rank, written in enumerate(moments(killed.files.checkpoints / "step-3")):
        assert written == {
            f"state.model.{name}.{moment}": list(of_rank[rank].shape)
            for name, of_rank in chunks.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }


def test_workers_that_all_have_the_optimizer_write_a_part_each(trained, target):
    """DDP: each about a half, and no tensor twice."""
    sizes = [num_elements(shapes) for shapes in moments(trained / "growing" / "checkpoints" / "step-6")]
    assert len(sizes) == 2 and max(sizes) < 1.5 * min(sizes)
    assert sum(sizes) == 2 * AutoModelForCausalLM.from_pretrained(target).num_parameters()


def test_killed_within_a_checkpoint_any_number_of_workers_goes_on_from_the_one_before(tmp_path, target, killed, alone):
    half = killed.files.checkpoints / "step-6"
    assert (half / "checkpoint.json").exists() and (half / "model.safetensors").exists(), "put down by rank 0"
    assert len(list(half.glob("optimizer-*/*"))) == 1
    newest = newest_complete(killed.checkpoints)
    assert newest is not None and newest.name == "step-3"

    one, three = job_in(tmp_path / "one", target), job_in(tmp_path / "three", target)
    for job in (one, three):
        shutil.copytree(killed.run_folder, job.run_folder)
    train(one, FakeFusion(target, corpus(18)))
    same(one, alone)
    codes = run_workers(sharded_attempt, target, three.run_folder, None, num_workers=3, meeting=tmp_path / "three.gloo")
    assert codes == [0, 0, 0]
    same(three, alone)

    assert len(moments(three.files.checkpoints / "step-9")) == 3
    shutil.rmtree(three.files.checkpoints / "step-10")
    train(three, FakeFusion(target, corpus(18)))
    same(three, alone)


def test_another_number_of_workers_loses_and_repeats_no_window(target, trained, alone):
    growing = job_in(trained / "growing", target)
    same(growing, alone)
    ledger = read_rows(growing.files.ledger)
    for epoch in range(2):
        seen = [index for row in ledger if row["epoch"] == epoch for index in row["windows"]]
        assert sorted(seen) == list(range(18))


def test_sharded_lora_like_one_worker(tmp_path, target, trained):
    alone = job_in(tmp_path, target, lora={"rank": 1})
    train(alone, FakeFusion(target, corpus(18)))
    same(job_in(trained / "lora", target), alone)


def test_a_worker_that_gets_its_weights_from_another_loads_none(target):
    config = job_in(target.parent, target, parallel="fsdp", num_workers=2).config
    model = TrainedTarget(target, config, restore_from=None, empty=True).model
    assert all(weight.is_meta for weight in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied as in the target"


def test_steps_to_which_a_worker_brings_no_window_are_like_those_of_one_worker(tmp_path, target):
    """Blocks of 8 windows, steps of 4: each step lies in one block or two, and most in one worker's alone."""
    alone = job_in(tmp_path / "alone", target)
    train(alone, FakeFusion(target, corpus(18), block_windows=8))
    assert run_workers(in_blocks, target, tmp_path, num_workers=2, meeting=tmp_path / "blocks.gloo") == [0, 0]
    for parallel in ("ddp", "fsdp"):
        same(job_in(tmp_path / parallel, target), alone)
