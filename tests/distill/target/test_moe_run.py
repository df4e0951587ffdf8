"""Runs with `distill.moe`: the dense target's function at the first step, and all that a run has for dense targets."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.base.errors import FailedPreconditionError
from services.distill.config import DistillConfig
from services.distill.job import DistillJob
from services.distill.plan import claim_run, make_plan
from services.distill.target.config import TargetConfig
from services.distill.target.moe import upcycle
from services.distill.target.prepare import prepare_target
from services.distill.workers.parallel import parallelise
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from services.models.weights import load_model, save_model
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, keeping, run_workers, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

MOE = {"shards": 6, "shared": 2, "copies": 2}
SPLIT = MOE | {"init": "split", "router_std": 0.5}
SAME = ("loss", "clm", "fusion", "gradient_norm", "tokens")


def columns(job) -> list[list[float]]:
    return [[row[key] for key in SAME] for row in read_rows(job.files.metrics)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, target):
    """A whole run by one worker for each init."""
    torch.set_num_threads(1)
    jobs = {}
    for moe in (MOE, SPLIT):
        job = job_in(tmp_path_factory.mktemp("moe"), target, moe=moe)
        train(job, FakeFusion(target, corpus(18)))
        jobs[moe.get("init", "residual")] = job
    return jobs


@pytest.mark.parametrize("init", ["residual", "split"])
def test_it_starts_as_the_dense_target_and_ends_in_a_folder_of_its_own(tmp_path, target, undisturbed, init):
    dense, job = job_in(tmp_path, target), undisturbed[init]
    train(dense, FakeFusion(target, corpus(18)))
    rows, dense_rows = read_rows(job.files.metrics), read_rows(dense.files.metrics)
    for key in ("clm", "fusion"):  # the loss has the balance of the experts in it
        assert rows[0][key] == pytest.approx(dense_rows[0][key], abs=1e-5)
        assert rows[-1][key] != pytest.approx(dense_rows[-1][key], abs=1e-5)
    assert rows[-1]["clm"] < rows[0]["clm"] - 0.1
    for folder in (job.files.model, job.files.checkpoints / "step-3"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_tok) == (
            "qwen2_moe",
            8,
            4,
        )
        assert AutoTokenizer.from_pretrained(folder)("what comes next").input_ids
    started = upcycle(load_model(target), job.config.moe.upcycling, seed=job.config.seed).state_dict()
    for name, weight in weights(job.files.model).items():
        assert not torch.equal(weight, started[name]), name


def killed_at_the_second_checkpoint(job: DistillJob, target_folder: Path) -> None:
    """A run that is killed when step 6 has been taken, written to the logs, and not yet kept."""
    keep_first = keeping(job)

    def keep(metrics: dict, folder: Path, step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        keep_first(metrics, folder, step)

    fusion = FakeFusion(target_folder, corpus(18))
    DistillWorker(job, make_plan(job, fusion), fusion, World(), keep_checkpoint=keep).run()


@pytest.mark.parametrize("init", ["residual", "split"])
def test_a_killed_run_goes_on_bit_equal(tmp_path, target, undisturbed, init):
    job = job_in(tmp_path, target, moe=MOE if init == "residual" else SPLIT)
    attempt = get_context("fork").Process(target=killed_at_the_second_checkpoint, args=(job, target))
    attempt.start()
    attempt.join(120)
    assert attempt.exitcode == -signal.SIGKILL and len(columns(job)) == 6
    newest = newest_complete(job.checkpoints)
    assert newest is not None and newest.name == "step-3"
    train(job, FakeFusion(target, corpus(18)))
    assert columns(job) == columns(undisturbed[init])
    expected = weights(undisturbed[init].files.model)
    for name, weight in weights(job.files.model).items():
        assert torch.equal(weight, expected[name]), name


def test_the_rows_of_a_copy_are_equal_when_training_ends(undisturbed):
    model = AutoModelForCausalLM.from_pretrained(undisturbed["split"].files.model)
    for layer in model.model.layers:
        rows = layer.mlp.gate.weight.view(2, 4, -1)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_checkpointed_packed_passes_learn_the_same(tmp_path, target, undisturbed):
    job = job_in(
        tmp_path, target, moe=MOE, gradient_checkpointing=True, pack_tokens=64, micro_batch_windows=2, dtype="float32"
    )
    train(job, FakeFusion(target, corpus(18)))
    for mine, theirs in zip(columns(job), columns(undisturbed["residual"]), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


def two_workers(rank: int, target_folder: Path, folder: Path) -> None:
    """DDP until the stream breaks, then FSDP to the end."""
    for parallel, break_after in (("ddp", 7), ("fsdp", None)):
        job = job_in(folder, target_folder, moe=SPLIT, num_workers=2, parallel=parallel)
        shards = partial(parallelise, kind=parallel, device=torch.device("cpu"))
        world = World(rank=rank, size=2, parallel=shards)
        newest = newest_complete(job.checkpoints)
        dist.barrier()
        fusion = FakeFusion(target_folder, corpus(18), break_after=break_after)
        worker = DistillWorker(
            job,
            make_plan(job, fusion),
            fusion,
            world,
            restore_from=None if newest is None else job.files.checkpoints / newest.name,
            keep_checkpoint=keeping(job),
        )
        try:
            worker.run()
        except FailedPreconditionError:
            assert break_after is not None
        dist.barrier()


def test_two_workers_with_whole_models_and_then_shards_learn_the_same(tmp_path, target, undisturbed):
    codes = run_workers(two_workers, target, tmp_path / "run", num_workers=2, meeting=tmp_path / "meeting")
    assert codes == [0, 0]
    job = job_in(tmp_path / "run", target)
    assert len(columns(job)) == 10
    for mine, theirs in zip(columns(job), columns(undisturbed["split"]), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    for name, weight in weights(job.files.model).items():
        torch.testing.assert_close(weight, weights(undisturbed["split"].files.model)[name], rtol=0, atol=1e-4)


def test_the_shape_is_part_of_the_identity(tmp_path, target):
    begun = job_in(tmp_path / "begun", target, moe=MOE)
    fusion = FakeFusion(target, corpus(18), break_after=15)
    claim_run(begun, make_plan(begun, fusion))
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(begun, fusion)
    for number, moe in enumerate((MOE | {"copies": 3}, None)):
        shutil.copytree(begun.run_folder, tmp_path / str(number))
        job = job_in(tmp_path / str(number), target, moe=moe)
        with pytest.raises(FailedPreconditionError, match=r"^distill\.moe: run run was started with"):
            claim_run(job, make_plan(job, fusion))
    assert "distill.moe" not in make_plan(job_in(tmp_path / "dense", target), fusion).settings


def test_a_target_that_cannot_be_a_mixture_is_refused_before_any_worker_starts(tmp_path, target):
    with pytest.raises(ValueError, match=r"^distill\.moe: shards: must cut intermediate_size = 48"):
        make_plan(job_in(tmp_path, target, moe={}), FakeFusion(target, corpus(18)))
    config = TargetConfig.model_validate(
        {
            "architecture": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2},
            "tokenizer": {"folder": str(target)},
        }
    )
    folder = prepare_target(config, (), tmp_path / "gpt2", seed=0)
    with pytest.raises(ValueError, match=r"^distill\.moe: a model of type gpt2 cannot become a mixture of experts"):
        make_plan(job_in(tmp_path, folder, moe=MOE), FakeFusion(folder, corpus(18)))


def test_adapters_need_the_mixture_first_and_then_reach_its_experts(tmp_path, target):
    with pytest.raises(ValidationError, match="make the mixture with `fusion upcycle` and give its folder"):
        DistillConfig.model_validate({"moe": {}, "lora": {}})
    folder = tmp_path / "mixture"
    upcycling = job_in(tmp_path, target, moe=SPLIT).config.moe.upcycling
    save_model(upcycle(load_model(target), upcycling, seed=0), target, folder)
    job = job_in(tmp_path / "run", folder, epochs=1, lora={"rank": 2}, learning_rate=1e-2)
    train(job, FakeFusion(folder, corpus(18)))
    untouched, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, job.files.model))
    for name, weight in untouched.state_dict().items():
        if "mlp.experts." in name:
            assert not torch.equal(weight, merged.state_dict()[name]), name
    adapted = peft.PeftModel.from_pretrained(untouched, str(job.files.adapter))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
