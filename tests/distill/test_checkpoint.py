"""The files of a checkpoint: data only, a shard a worker, and readable by other numbers of workers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import AutoModelForCausalLM

from services.base.errors import FailedPreconditionError
from services.distill.checkpoint import restore_optimizer
from services.distill.optimizer import TargetOptimizer
from services.jobs.step_log import read_rows
from services.jobs.storage import newest_complete
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, target):
    torch.set_num_threads(1)
    job = job_in(tmp_path_factory.mktemp("begun"), target)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(job, FakeFusion(target, corpus(18), break_after=15))
    return job


def optimizer_of(job, folder):
    """Module and optimiser with the state of a checkpoint."""
    module = torch.nn.ModuleDict({"model": AutoModelForCausalLM.from_pretrained(job.target_folder)})
    optimizer = TargetOptimizer(module, job.config).adamw
    restore_optimizer(module, optimizer, folder)
    return module, optimizer


def test_a_checkpoint_is_data_only_and_its_list_names_every_file(begun):
    folder = begun.files.checkpoints / "step-3"
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {file.rpartition(".")[2] for file in files} <= {"json", "safetensors", "jinja"}
    assert set(json.loads((folder / "checkpoint.json").read_text())["files"]) == files - {"checkpoint.json"}
    shards = list(folder.glob("optimizer-*/*.safetensors"))
    with safe_open(shards[0], "pt") as shard:
        assert len(shards) == 1 and "state.model.model.norm.weight.exp_avg" in shard.keys()  # noqa: SIM118


def test_shards_of_an_attempt_that_was_killed_are_not_read(tmp_path, target, begun):
    job = job_in(tmp_path / "run", target)
    shutil.copytree(begun.run_folder, job.run_folder)
    folder = job.files.checkpoints / "step-3"
    [shards] = folder.glob("optimizer-*")
    other = folder / "optimizer-00000000"
    other.mkdir()
    (folder / "trainer_state.pt").write_bytes(b"half of what an earlier version wrote")
    (other / next(shards.iterdir()).name).write_bytes(b"half a shar")
    assert newest_complete(job.checkpoints) is not None
    train(job, FakeFusion(target, corpus(18)))
    assert len(read_rows(job.files.metrics)) == 10


def test_a_checkpoint_with_its_state_in_one_file_is_still_resumed(tmp_path, target, begun):
    """As earlier versions wrote it."""
    sharded, whole = job_in(tmp_path / "sharded", target), job_in(tmp_path / "whole", target)
    for job in (sharded, whole):
        shutil.copytree(begun.run_folder, job.run_folder)
    folder = whole.files.checkpoints / "step-3"
    module, optimizer = optimizer_of(whole, folder)
    state = get_optimizer_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True))
    position = json.loads((folder / "trainer_state.json").read_text())["position"]
    position["plan"] = position.pop("identity")
    torch.save({"optimizer": dict(state), "position": position}, folder / "trainer_state.pt")
    (folder / "trainer_state.json").unlink()
    shutil.rmtree(next(folder.glob("optimizer-*")))
    manifest = json.loads((folder / "checkpoint.json").read_text())
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "checkpoint.json"}
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"files": sizes}))
    for job in (sharded, whole):
        train(job, FakeFusion(target, corpus(18)))
    for name, weight in weights(sharded.files.model).items():
        torch.testing.assert_close(weights(whole.files.model)[name], weight, rtol=0, atol=1e-6)


def test_shards_that_cannot_be_read_are_named(tmp_path, target, begun):
    job = job_in(tmp_path / "run", target)
    shutil.copytree(begun.run_folder, job.run_folder)
    [shard] = (job.files.checkpoints / "step-3").glob("optimizer-*/*")
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(OSError, match=rf"optimiser state: cannot read step-3/{shard.parent.name} \(worker 0\): "):
        train(job, FakeFusion(target, corpus(18)))
