"""Balance without a loss: biases of the routers of a target from scratch, moved after every step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from services.base.errors import FailedPreconditionError
from services.distill.config import DistillConfig
from services.distill.plan import make_plan
from services.distill.target.config import TargetConfig
from services.distill.target.prepare import prepare_target
from services.distill.workers.parallel import parallelise
from services.distill.workers.worker import DistillWorker
from services.distill.workers.world import World
from services.jobs.step_log import read_rows
from tests.fakes.fusion_stream import FakeFusion, corpus
from tests.fakes.training import job_in, run_workers, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
BIAS = {"balance": {"expert": 0, "bias": 0.02}}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, target):
    config = TargetConfig.model_validate({"architecture": SHAPE, "tokenizer": {"folder": str(target)}})
    return prepare_target(config, (), tmp_path_factory.mktemp("mixture") / "target", seed=1)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory, mixture):
    torch.set_num_threads(1)
    job = job_in(tmp_path_factory.mktemp("balanced"), mixture, moe=BIAS)
    train(job, FakeFusion(mixture, corpus(18)))
    return job


def biases(job) -> torch.Tensor:
    found = weights(job.files.model)
    return torch.stack([found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in range(2)])


def test_loads_become_even_and_the_loss_has_no_part_in_it(tmp_path, mixture, balanced):
    job = job_in(tmp_path, mixture, moe={"balance": {"expert": 0}})
    train(job, FakeFusion(mixture, corpus(18)))
    with_bias, without = read_rows(balanced.files.metrics), read_rows(job.files.metrics)
    assert with_bias[0]["routing"] == without[0]["routing"]
    for layer in range(2):
        even, uneven = (sum(row["routing"]["load_cv"][layer] for row in rows[-5:]) for rows in (with_bias, without))
        assert even < 0.75 * uneven
    for row in with_bias:
        assert row["loss"] == pytest.approx(0.3 * row["clm"] + 0.7 * row["fusion"], rel=1e-5)
    assert torch.equal(biases(job), torch.zeros(2, 8))


def test_biases_move_by_the_step_and_are_saved(balanced):
    """Ten steps of 0.02 up, down, or not at all."""
    moves = biases(balanced) / 0.02
    torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-4)
    assert moves.abs().max() <= 10 and (moves > 0).any() and (moves < 0).any()


def test_a_resumed_run_is_bit_equal(tmp_path, mixture, balanced):
    job = job_in(tmp_path, mixture, moe=BIAS)
    fusion = FakeFusion(mixture, corpus(18), break_after=15)
    with pytest.raises(FailedPreconditionError, match="the stream broke"):
        train(job, fusion)
    train(job, fusion)
    expected = weights(balanced.files.model)
    for name, weight in weights(job.files.model).items():
        assert torch.equal(weight, expected[name]), name


def two_workers(rank: int, target_folder: Path, folder: Path) -> None:
    for name in ("ddp", "fsdp"):
        job = job_in(folder / name, target_folder, moe=BIAS, num_workers=2, parallel=name)
        shards = partial(parallelise, kind=name, device=torch.device("cpu"))
        fusion = FakeFusion(target_folder, corpus(18))
        DistillWorker(job, make_plan(job, fusion), fusion, World(rank=rank, size=2, parallel=shards)).run()


def test_two_workers_move_the_same_biases(tmp_path, mixture, balanced):
    codes = run_workers(two_workers, mixture, tmp_path, num_workers=2, meeting=tmp_path / "meeting")
    assert codes == [0, 0]
    for name in ("ddp", "fsdp"):
        job = job_in(tmp_path / name, mixture)
        torch.testing.assert_close(biases(job), biases(balanced), rtol=0, atol=1e-6)


def test_it_is_part_of_the_identity(tmp_path, mixture):
    fusion = FakeFusion(mixture, corpus(18))
    moes = ({"balance": {"expert": 0}}, BIAS)
    without, with_bias = (make_plan(job_in(tmp_path, mixture, moe=moe), fusion).settings for moe in moes)
    assert "bias" not in without["distill.moe"]["balance"]  # earlier runs did not record it
    assert with_bias["distill.moe"]["balance"]["bias"] == 0.02


def test_routers_without_biases_are_refused(tmp_path, target):
    job = job_in(tmp_path, target, moe={"shards": 6} | BIAS)
    message = (
        r"^distill\.moe\.balance\.bias: only routers of deepseek_v3 and glm4_moe have biases, the target is a llama"
    )
    with pytest.raises(ValueError, match=message):
        make_plan(job, FakeFusion(target, corpus(18)))
    with pytest.raises(ValueError, match="bias"):
        DistillConfig.model_validate({"moe": {"balance": {"bias": -1}}})
