"""Two workers on gloo: whole models (DDP) and shards (FSDP2) learn the same and share checkpoints."""

from __future__ import annotations

import faulthandler
import math
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
from tests.fakes.training import job_in, keeping, train, weights

CHANGES: dict[str, object] = {"micro_batch_windows": 1, "eval_every_steps": 5}


def attempt(job: DistillJob, target_folder: Path, rank: int, *, break_after: int | None) -> None:
    """One attempt of two workers, which a broken stream may end."""
    fusion = FakeFusion(target_folder, corpus(18), held_out=corpus(5, seed=9), break_after=break_after)
    parallel = partial(parallelise, kind=job.config.parallel, device=torch.device("cpu"))
    world = World(rank=rank, size=2, parallel=parallel)
    newest = newest_complete(job.checkpoints)
    dist.barrier()
    restore_from = None if newest is None else job.files.checkpoints / newest.name
    worker = DistillWorker(
        job, make_plan(job, fusion), fusion, world, restore_from=restore_from, keep_checkpoint=keeping(job)
    )
    try:
        worker.run()
    except FailedPreconditionError:
        assert break_after is not None
    dist.barrier()


def worker(rank: int, port: int, target_folder: Path, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    faulthandler.enable()  # gloo's own thread has crashed once: should it again, this says in what
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    turns = job_in(folder / "turns", target_folder, num_workers=2, **CHANGES)
    sharded = job_in(folder / "turns", target_folder, num_workers=2, parallel="fsdp", **CHANGES)
    # A step takes two windows of each worker, a checkpoint is made every third one: DDP up to step 3, FSDP up to 6.
    attempt(turns, target_folder, rank, break_after=7)
    attempt(sharded, target_folder, rank, break_after=7)
    attempt(turns, target_folder, rank, break_after=None)
    attempt(job_in(folder / "growing", target_folder, num_workers=2), target_folder, rank, break_after=7)
    lora = job_in(folder / "lora", target_folder, num_workers=2, parallel="fsdp", epochs=1, lora={"rank": 4})
    attempt(lora, target_folder, rank, break_after=None)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One worker up to step 3, two up to step 6, and one to the end.
    growing = job_in(folder / "growing", target)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(growing, FakeFusion(target, corpus(18), break_after=15))
    mp.spawn(worker, args=(port, target, folder), nprocs=2)
    train(growing, FakeFusion(target, corpus(18)))
    return folder


def same(ours: DistillJob, theirs: DistillJob) -> None:
    """Same windows in every step, and the same run within 1e-4."""
    assert read_rows(ours.files.ledger) == read_rows(theirs.files.ledger)
    mine, reference = read_rows(ours.files.metrics), read_rows(theirs.files.metrics)
    for key in ("loss", "clm", "fusion", "gradient_norm"):
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in reference], abs=1e-4)
    trained_weights = weights(ours.files.model)
    for name, weight in weights(theirs.files.model).items():
        torch.testing.assert_close(trained_weights[name], weight, rtol=0, atol=1e-4)


def test_from_ddp_to_fsdp_and_back_like_one_undisturbed_worker(tmp_path, target, trained):
    alone = job_in(tmp_path, target, eval_every_steps=5)
    train(alone, FakeFusion(target, corpus(18), held_out=corpus(5, seed=9)))
    turns = job_in(trained / "turns", target)
    same(turns, alone)
    assert len(read_rows(turns.files.ledger)) == 10
    ours, theirs = read_rows(turns.files.evaluations), read_rows(alone.files.evaluations)
    assert [row["nats_per_byte"] for row in ours] == pytest.approx([row["nats_per_byte"] for row in theirs], abs=1e-5)


def test_every_worker_writes_a_part_of_the_optimizer(trained):
    """Of two workers each about a half, sharded (FSDP2) or dealt out (DDP), and no tensor twice."""
    for checkpoint in ("turns/checkpoints/step-6", "growing/checkpoints/step-6"):
        [folder] = (trained / checkpoint).glob("optimizer-*")
        sizes: dict[str, int] = {}
        elements = 0
        for file in folder.iterdir():
            with safe_open(file, "pt") as shard:
                moments = [shard.get_slice(key).get_shape() for key in shard.keys() if key.endswith("exp_avg")]  # noqa: SIM118
                elements += sum(math.prod(shape) for shape in moments)
            rank = file.name.partition("-model")[0]
            sizes[rank] = sizes.get(rank, 0) + file.stat().st_size
        assert len(sizes) == 2 and max(sizes.values()) < 1.5 * min(sizes.values())
        assert elements == AutoModelForCausalLM.from_pretrained(trained / checkpoint).num_parameters()


def test_another_number_of_workers_loses_and_repeats_no_window(tmp_path, target, trained):
    alone = job_in(tmp_path, target)
    train(alone, FakeFusion(target, corpus(18)))
    growing = job_in(trained / "growing", target)
    same(growing, alone)
    ledger = read_rows(growing.files.ledger)
    for epoch in range(2):
        seen = [index for row in ledger if row["epoch"] == epoch for index in row["windows"]]
        assert sorted(seen) == list(range(18))


def test_sharded_lora_like_one_worker(tmp_path, target, trained):
    alone = job_in(tmp_path, target, epochs=1, lora={"rank": 4})
    train(alone, FakeFusion(target, corpus(18)))
    same(job_in(trained / "lora", target), alone)


def test_a_worker_that_gets_its_weights_from_another_loads_none(target):
    config = job_in(target.parent, target, parallel="fsdp", num_workers=2).config
    model = TrainedTarget(target, config, restore_from=None, empty=True).model
    assert all(weight.is_meta for weight in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied as in the target"
